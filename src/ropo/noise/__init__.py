"""How many labels are flipped, which ones, and what to do about each pair.

In: the margin h of every pair, from a model that was not trained on that pair; `linear` makes such margins of features.
Out: `estimate.FlipEstimate`, then `decide.Decisions`.

The one idea: a model that has learned something agrees with right labels and contradicts flipped ones, so the
margins of right and flipped labels are mirror images, and the mixture of the two tells how large each part is.

The way: `linear` -> `likelihood` -> `estimate` -> `decide`, `calibrate`, `review_order`; `shares` helps.
"""
