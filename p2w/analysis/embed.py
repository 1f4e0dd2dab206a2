"""Features on a plane: t-SNE (van der Maaten and Hinton 2008), as in the paper's Fig. 2a."""

import numpy as np
from numpy.typing import NDArray

PERPLEXITY = 30.0


def tsne(features: NDArray[np.floating], seed: int) -> NDArray[np.float64]:
    """Features (N, C) -> places (N, 2), by Euclidean distance.

    Centred and brought to one overall scale first: the features of a network that never learned differ in the sixth digit,
    which float32 distances would lose. t-SNE itself does not depend on the scale.
    """
    from sklearn.manifold import TSNE  # noqa: PLC0415  (2 s of imports)

    wide = features.astype(np.float64)
    wide -= wide.mean(0)
    spread = wide.std()
    if len(wide) < 3 or spread == 0:  # all in one point
        return np.zeros((len(wide), 2))
    perplexity = min(PERPLEXITY, (len(wide) - 1) / 3)
    model = TSNE(perplexity=perplexity, init="pca", learning_rate="auto", random_state=seed)
    return np.asarray(model.fit_transform(wide / spread), np.float64)
