"""What the plots and the page have in common: their colours, and when an axis is logarithmic."""

# The palette of Okabe and Ito, whose colours colour-blind readers can tell apart, without its
# yellow, which is faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY = "#555555"
LOG_RATIO = 20  # An axis is logarithmic if its values differ by a larger factor than this.
