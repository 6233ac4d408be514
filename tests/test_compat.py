from utils.compat import import_advertorch, import_torchvision


def test_torchvision_data_sets_transforms_and_models_import():
    assert import_torchvision("datasets").CIFAR10
    assert import_torchvision("transforms").RandomCrop
    assert import_torchvision("models").resnet18


def test_import_can_be_repeated():
    assert import_torchvision() is import_torchvision()


def test_advertorch_imports():
    assert import_advertorch().LinfPGDAttack
