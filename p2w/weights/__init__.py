"""The way out: a trained encoder as a file that describes itself, and back.

    encoder = p2w.load("runs/paper")          a run, a checkpoint, an exported file or a hub folder
    p2w export runs/paper --to safetensors    and models-genesis, nnunet, hub-folder

Every file carries a card: what the network is, and what it wants to be fed.
"""
