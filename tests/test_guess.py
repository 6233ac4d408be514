import pytest

from tests.test_data import write_tinyimagenet
from tests.toy import write_image_tree
from utils.settings.command_line import parse_settings
from utils.settings.guess import guess_data_set
from utils.settings.stored import SETTINGS_OF


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


@pytest.mark.parametrize("annotations", [True, False])
def test_what_lies_in_a_folder_counts_before_its_name(tmp_path, annotations):
    write_tinyimagenet(tmp_path / "cifar10", annotations)
    assert guess_data_set(tmp_path / "cifar10") == "tinyimagenet"
    write_image_tree(tmp_path / "tiny-imagenet-200")
    assert guess_data_set(tmp_path / "tiny-imagenet-200") == "imagefolder"
    for file, dataset in (
        ("cifar-10-batches-py/data_batch_1", "cifar10"),
        ("cifar-100-python/train", "cifar100"),
        ("train_32x32.mat", "svhn"),
    ):
        touch(tmp_path / dataset / "tiny" / file)
        assert guess_data_set(tmp_path / dataset / "tiny") == dataset


def test_wordnets_numbers_alone_are_not_tiny_imagenet(tmp_path):
    for place in ("imagenette", "tiny-imagenet"):
        for part in ("train", "val"):
            touch(tmp_path / place / part / "n01440764" / "a.JPEG")
    assert guess_data_set(tmp_path / "imagenette") == "imagefolder"
    assert guess_data_set(tmp_path / "tiny-imagenet") == "tinyimagenet"


@pytest.mark.parametrize(
    ("path", "dataset"),
    [
        ("data/cifar10/", "cifar10"),
        ("CIFAR-100", "cifar100"),
        ("my_cifar10", "cifar10"),
        ("TinyImageNet200", "tinyimagenet"),
        ("svhn_cropped", "svhn"),
        ("tiny", None),
        ("destiny", None),
        ("tinyimages", None),
        ("cifar1000", None),
        ("/home/svhn/photographs", None),
    ],
)
def test_names_count_as_whole_words_of_the_folder_itself(path, dataset):
    assert guess_data_set(path) == dataset


def test_of_two_data_sets_in_a_folder_its_name_decides(tmp_path):
    for place in ("data", "cifar100"):
        for file in ("cifar-10-batches-py/test_batch", "cifar-100-python/test"):
            touch(tmp_path / place / file)
    assert guess_data_set(tmp_path / "data") is None
    assert guess_data_set(tmp_path / "cifar100") == "cifar100"


@pytest.mark.parametrize("kind", SETTINGS_OF.values())
def test_every_script_guesses_alike(kind, image_tree):
    assert (
        parse_settings(kind, ["--data", str(image_tree)], "", lambda given: {}).dataset
        == "imagefolder"
    )
