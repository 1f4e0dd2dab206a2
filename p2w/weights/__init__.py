"""Export and load trained encoders, as files with a model card.

    encoder = p2w.load("runs/paper")          a run, a checkpoint, an exported file or a hub folder
    p2w export runs/paper --to safetensors    and models-genesis, nnunet, hub-folder

Every file has a card that describes the network and its input.
"""
