"""The methods against those of the published packages mergekit and fusion-bench: `make parity`.

Both are installed in an environment of their own (`.venv-parity`, pinned in `constraints.txt`). Where two packages
compute the same variant, the merges agree to 1e-6 of the merged task vector's length; where they don't, a test
says in what they differ and shows that the named difference is the only one. Neither has AWD, LiNeS, MetaGPT or
PCB-Merging.
"""
