"""Code in C, built at installation where there is a compiler; without it torch does the same, slower."""
