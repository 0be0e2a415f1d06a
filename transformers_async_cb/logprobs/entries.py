"""Sizes: of what is asked about a token, and of the answer."""

# Tokens that may be listed beside a token, and words of an answer: see `rank`.
MOST_LIKELIEST = 20
RANKED_WORDS = 1 + 2 * MOST_LIKELIEST

# Words of an entry: the row of its logits, the token (-1: the one picked there), how many of the likeliest.
ENTRY_WORDS = 3

# Tokens of prompts that one step may score. Each needs logits, as large as the vocabulary: 78 MB of bfloat16 in all
# with 152K words. The products of a step of so many tokens take about as long as reading the weights.
MOST_SCORED = 256
