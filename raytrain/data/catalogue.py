"""Known data sets by name: classes, channels, statistics of pixels, and the customary threat."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """Properties of a data set. Mean, standard deviation and `eps` are in pixels of [0, 1]."""

    description: str
    channels: int
    size: int  # height and width
    classes: tuple[str, ...]
    mean: tuple[float, ...]  # per channel, over the training images
    std: tuple[float, ...]
    eps: float = 8 / 255  # the customary radius of the l-infinity ball
    flip: bool = False  # whether mirroring preserves the class
    pad: int = 0  # border of a random crop


_DIGITS = tuple("0123456789")
_CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"
_CIFAR100 = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus
    butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch
    crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo
    keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain
    mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain
    plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
    skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone
    television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""
_FASHION = "T-shirt/top Trouser Pullover Dress Coat Sandal Shirt Sneaker Bag"

SOURCES: dict[str, Source] = {
    "digits": Source(
        description="1,797 handwritten digits inside scikit-learn, nothing to fetch",
        channels=1,
        size=8,
        classes=_DIGITS,
        mean=(0.3058,),
        std=(0.3762,),
        eps=0.1,
        pad=1,
    ),
    "cifar10": Source(
        description="60,000 photographs of ten kinds of animals and vehicles",
        channels=3,
        size=32,
        classes=tuple(_CIFAR10.split()),
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2471, 0.2435, 0.2616),
        flip=True,
        pad=4,
    ),
    "cifar100": Source(
        description="60,000 photographs of a hundred kinds",
        channels=3,
        size=32,
        classes=tuple(_CIFAR100.split()),
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        flip=True,
        pad=4,
    ),
    "mnist": Source(
        description="70,000 handwritten digits",
        channels=1,
        size=28,
        classes=_DIGITS,
        mean=(0.1307,),
        std=(0.3081,),
        eps=0.3,
        pad=2,
    ),
    "fashion_mnist": Source(
        description="70,000 grey photographs of clothes",
        channels=1,
        size=28,
        classes=(*_FASHION.split(), "Ankle boot"),
        mean=(0.2860,),
        std=(0.3530,),
        eps=0.1,
        flip=True,
        pad=2,
    ),
    "svhn": Source(
        description="99,289 house numbers photographed from the street",
        channels=3,
        size=32,
        classes=_DIGITS,
        mean=(0.4377, 0.4438, 0.4728),
        std=(0.1980, 0.2010, 0.1970),
        pad=4,
    ),
}
