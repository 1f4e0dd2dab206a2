"""Writes tests/weights/niftynet/skips_even.npz: what NiftyNet's own dense V-Net makes of volumes with even edges.

    pip install tensorflow-cpu==2.21.0 scipy six pillow nibabel pandas packaging blinker configparser
    pip install --no-deps niftynet==0.6.0
    python tests/weights/reference/niftynet_skips.py

Its class builds the graph, its variables are read from the checkpoint in tests/weights/niftynet, its axes are A, R, S.
NiftyNet wants TensorFlow 1, which the compatibility module of TensorFlow 2 gives it.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import tensorflow.compat.v1 as tf

FOLDER = Path(__file__).resolve().parents[1] / "niftynet"
SHAPES = {"even": (32, 16, 24), "cube": (16, 16, 16)}  # A, R, S: edges divisible by 8, as NiftyNet asks


def volume(shape: tuple[int, int, int]) -> np.ndarray:
    """A volume (A, R, S) that a test makes again."""
    return np.sin(np.arange(np.prod(shape)) ** 1.3).astype(np.float32).reshape(shape)


class Contrib(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Empty modules for TensorFlow 1's `contrib`, of which NiftyNet imports names that this network never calls."""

    def find_spec(self, name, path=None, target=None):
        """Claim what lies in `tensorflow.contrib`."""
        ours = name.startswith("tensorflow.contrib")
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if ours else None

    def create_module(self, spec):
        """A module that has every name, each of them None."""
        module = types.ModuleType(spec.name)
        module.__getattr__ = lambda name: None
        return module

    def exec_module(self, module):
        """Nothing to run."""


def main() -> None:
    """Build, restore, run, write."""
    sys.modules["tensorflow"] = tf
    np.int = int  # NumPy had this name when NiftyNet was written
    tf.disable_eager_execution()
    sys.meta_path.insert(0, Contrib())
    tf.contrib = importlib.import_module("tensorflow.contrib")
    # The package's own __init__ imports its command line, which needs a part of Keras that is no more.
    package = types.ModuleType("niftynet")
    package.__path__ = list(importlib.util.find_spec("niftynet").submodule_search_locations)
    sys.modules["niftynet"] = package
    dense_vnet = importlib.import_module("niftynet.network.dense_vnet")

    found = {}
    block = dense_vnet.DenseFeatureStackBlockWithSkipAndDownsample
    original = block.layer_op
    for name, shape in SHAPES.items():
        tf.reset_default_graph()
        skips = []

        def noting(self, *arguments, noted=skips, **named):
            skip, down = original(self, *arguments, **named)
            noted.append(skip)
            return skip, down

        block.layer_op = noting
        network = dense_vnet.DenseVNet(
            num_classes=3,
            hyperparams={
                "n_dense_channels": [1, 1, 1], "n_seg_channels": [1, 2, 2], "n_initial_conv_channels": 2,
                "n_down_channels": [2, 2, None], "augmentation_scale": 0.0,
            },
        )  # fmt: skip
        image = tf.placeholder(tf.float32, (1, *shape, 1))
        network(image, is_training=False, keep_prob=1.0)
        with tf.Session() as session:
            checkpoint = str(FOLDER / "model.ckpt-7")
            there = {name for name, _ in tf.train.list_variables(checkpoint)}
            session.run(
                tf.global_variables_initializer()
            )  # slots of moving averages, which nothing here reads
            read = [one for one in tf.global_variables() if one.op.name in there]
            assert len(read) >= 159, len(read)
            tf.train.Saver(read).restore(session, checkpoint)
            made = session.run(skips, {image: volume(shape)[None, ..., None]})
        for i, skip in enumerate(made):
            found[f"{name}_{i}"] = skip
            print(name, i, skip.shape, float(np.abs(skip).mean()))
    np.savez_compressed(FOLDER / "skips_even.npz", **found)


if __name__ == "__main__":
    main()
