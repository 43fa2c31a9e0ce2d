"""Training: recipes, the loop, and `train`, which goes from a folder of images to an any-depth net.

    from adn.train import Config, recipe, train
    train(Config("flowers", "runs/flowers", recipe("default", model="resnet18", epochs=20), pretrained=True))

`fit` is the loop alone, for data of any kind and for plain networks too.

What differs from the reference's training (Adaptive Depth Networks, NeurIPS 2024), where a recipe of its own is used:

* random numbers: seeded per epoch, so that a run can be resumed exactly; initial weights are timm's (the head of a
  vision transformer is not zero);
* the second norms start as copies of the first; both are fresh, so this is the same unless a layer is initialised to
  zero (`twins`);
* one process runs each backward after its pass as the reference does; several run both passes, then one backward (the
  same gradients, without a search for unused parameters);
* fewer than 256 images with repeated augmentation give an epoch of all of them, in the reference an empty one;
* a last batch of a single image is left out;
* the weight average copies index tables, which the reference averages and truncates; weights are averaged in float32;
* evaluation counts every image once, where the reference pads the last batches of several processes with repetitions;
  all processes evaluate with the running statistics of the first;
* weight decay of tables (`table_decay`) also finds `pos_embed` and `pos_embedding`, which the reference's names miss;
  no published recipe depends on it.
"""

from ..core import lazy

_WHERE = {
    "TrainBatches": ".data", "mixing": ".data", "train_sampler": ".data", "train_transform": "..data.images",
    "holds_run": ".folder",
    "Diverged": ".loop", "Interrupted": ".loop", "Result": ".loop", "fit": ".loop",
    "Supervised": "..distill", "default_loss": "..tasks",
    "DEFAULT": ".recipes", "RECIPES": ".recipes", "Recipe": ".recipes", "recipe": ".recipes",
    "Config": ".run", "DetectionConfig": ".run", "train": ".run",
    "seed_all": ".seeds",
}
__all__ = [*_WHERE]
__getattr__, __dir__ = lazy.attach(globals(), _WHERE)
