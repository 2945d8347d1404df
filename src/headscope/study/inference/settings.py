"""What all intervals and tests share. Read when a function is called, so that a test may change it here."""

# draws of every bootstrap and permutation
RESAMPLES = 9999
# of intervals
LEVEL = 0.95
# a group of fewer gets no p-value, and its interval is marked exploratory
FEWEST_SOURCES = 20
# a corrected p-value below it is a finding
SIGNIFICANT = 0.05
