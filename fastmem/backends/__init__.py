"""The three operators (fc1_response, unit_update_, scale_rows_) in their homes; see :mod:`fastmem.backends.select`."""
