"""Reports of a training run: what its workdir says about it, as text and as a page to look at in a browser.

May import: training, cli, storage. Start reading at `gather.py`.
"""
