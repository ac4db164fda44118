"""The operators fc1_response, unit_update_ and scale_rows_ in plain torch and C++, and the choice between backends."""
