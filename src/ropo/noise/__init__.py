"""How many labels are flipped, which ones, and what to do about each pair.

In: the margin h of every pair, from a model that was not trained on that pair; `linear` makes such margins of features.
Out: `estimate.FlipEstimate` (the rate with its interval, or an upper bound, and P(flipped) per pair), then
`decide.Decisions` (keep, drop or flip, and a weight, for each pair).

The one idea: a model that has learned something agrees with right labels and contradicts flipped ones, so the
margins of right and flipped labels are mirror images, and the mixture of the two tells how large each part is.

The way: `linear` -> `likelihood` -> `estimate` -> `decide`, `calibrate`, `review_order`; `clusters` and `shares` help.

Add a rule: one function, one line in `decide.RULES`, one recovery test.
"""
