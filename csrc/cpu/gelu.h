// GELU in float32, as plain arithmetic that a compiler turns into vector instructions.
//
//   gelu(x) = max(x, 0) - |x| * tail(|x|)
//   erf:  tail(a) = (1 - erf(a / sqrt(2))) / 2 = exp(-a^2 / 2) * R(a), R a rational function
//   tanh: tail(a) = sigmoid(-2 u) = e / (1 + e) with e = exp(-2 u), u = sqrt(2 / pi) (a + 0.044715 a^3)
//
// The tail is formed without a difference of close numbers, so large negative x keep their digits. The coefficients of R
// and of 2^x's polynomial have the least relative error (3.5e-7 and 1e-7), found by reweighted least squares.
#pragma once

#include <cstdint>
#include <cstring>

namespace fastmem {

#define FASTMEM_INLINE static inline __attribute__((always_inline))

FASTMEM_INLINE float larger(float x, float bound) {
  return x < bound ? bound : x;
}

// 2^x for x <= 0; below -126, where float32 ends, what it is at -126 (1.2e-38). NaN stays NaN.
FASTMEM_INLINE float exp2_negative(float x) {
  x = larger(x, -126.0f);
  // adding 1.5 * 2^23 rounds to a whole number, which then stands in the lowest bits
  constexpr float kRound = 12582912.0f;
  const float shifted = x + kRound;
  const float rest = x - (shifted - kRound);
  float value = 1.326459053e-03f;
  value = value * rest + 9.671619020e-03f;
  value = value * rest + 5.550735032e-02f;
  value = value * rest + 2.402224046e-01f;
  value = value * rest + 6.931469764e-01f;
  value = value * rest + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  // 2^whole: the lowest bits of `shifted` moved into the exponent
  const uint32_t power_bits = (bits + 127) << 23;
  float power;
  std::memcpy(&power, &power_bits, sizeof(power));
  return value * power;
}

FASTMEM_INLINE float gelu_erf(float x) {
  const float size = __builtin_fabsf(x);
  // the tail ends before 15, and the powers of larger values would overflow
  const float a = size < 15.0f ? size : 15.0f;
  float over = 3.988901856e-01f;
  over = over * a + 2.810804564e+00f;
  over = over * a + 8.538990030e+00f;
  over = over * a + 1.184614814e+01f;
  float under = a + 7.040506790e+00f;
  under = under * a + 2.248766584e+01f;
  under = under * a + 3.598129209e+01f;
  under = under * a + 2.369230452e+01f;
  // log2(e) / 2
  const float tail = exp2_negative(-0.72134752f * (a * a)) * (over / under);
  return larger(x, 0.0f) - size * tail;
}

FASTMEM_INLINE float gelu_tanh(float x) {
  const float a = __builtin_fabsf(x);
  // 2 sqrt(2 / pi) log2(e) and that times 0.044715
  const float e = exp2_negative(-(a * (2.30220819f + 0.102943239f * (a * a))));
  return larger(x, 0.0f) - a * (e / (1.0f + e));
}

} // namespace fastmem
