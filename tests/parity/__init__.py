"""The methods against the published packages mergekit and fusion-bench, K-FAC against curvlinops: `make parity`.

They are installed in an environment of their own (`.venv-parity`, pinned in `constraints.txt`). Where two packages
compute the same variant, the merges agree to 1e-6 of the merged task vector's length; where they don't, a test
says in what they differ and shows that the named difference is the only one. None has AWD, LiNeS, MetaGPT,
PCB-Merging or MaTS.
"""
