"""From a file to pairs that a model can read.

In reading order: `problems` (what can be wrong with a row), `read` (sources to rows), `layouts` (where the texts of a
row stand), `load` (rows to pairs), `validate` (what is wrong with the texts), `template` (conversations to texts),
`encode` (texts to token ids), `tokenize` (pairs to token ids), `inject` (noise whose truth we know), `grammar`
(sentences and what they are worth) and `toy` (the embedded task).
"""
