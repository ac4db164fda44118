#pragma once

// one source, compiled three times, chosen when the library is loaded
#if defined(__x86_64__) && defined(__linux__)
#define FASTMEM_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FASTMEM_CLONES
#endif

