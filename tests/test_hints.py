"""What is said of a misspelt key or option: what was meant, if that is near, and who has a key that another has not."""

import pytest
from hydra import initialize_config_dir

from r2 import compose
from r2.config import GROUPS, UserError
from r2.hints import nearest, unknown_key, unknown_option


def told(words):
    with initialize_config_dir(str(compose.CONFIGS), version_base="1.3"), pytest.raises(Exception) as refused:
        compose.composed(words.split())
    error = refused.value
    return str(error) if isinstance(error, UserError) else compose.one_line(error)


OPTIONS = {group: sorted(path.stem for path in (compose.CONFIGS / group).glob("*.yaml")) for group in GROUPS}
KEYS = [
    "bits",
    "weight_bits",
    "width_mult",
    "epochs",
    "batch_size",
    "calibration_images",
    "checkpoint_seconds",
    "delta",
]


def misspelt(word):
    """Each letter once left out, doubled, replaced, and swapped with the next; numbers stay what they are."""
    for i in (i for i, letter in enumerate(word) if letter.isalpha()):
        yield word[:i] + word[i + 1 :]
        yield word[:i] + word[i] + word[i:]
        yield word[:i] + "q" + word[i + 1 :]
        if word[i + 1 : i + 2].isalpha():
            yield word[:i] + word[i + 1] + word[i] + word[i + 2 :]


@pytest.mark.parametrize("group", [*GROUPS, "keys"])
def test_a_word_with_one_mistake_is_known_again(group):
    words = OPTIONS.get(group, KEYS)
    for word in words:
        for wrong in set(misspelt(word)) - set(words):
            found = nearest(wrong, {one: one for one in words})
            assert word in found if len(word) >= 4 else not found or word in found or len(wrong) <= 3, (word, wrong)


@pytest.mark.parametrize(
    "group, wanted, meant",
    [
        ("model", "mobilenetv2", "'mbv2'"),
        ("model", "MobileNet-V1", "'mbv1'"),
        ("model", "mobilenet", "'mbv1' or 'mbv2'"),
        ("model", "mobilbert", "'mobilebert'"),
        ("model", "resnet18", "'rn18'"),
        ("model", "ResNet", "'rn18'"),
        ("data", "cifar", "'cifar10'"),
        ("data", "CIFAR-10", "'cifar10'"),
        ("data", "imagenet-shards", "'imagenet_shards'"),
        ("data", "fashion", "'fashion_mnist'"),
        ("data", "fashoin_mnsit", "'fashion_mnist'"),
        ("reg", "soft_min_max", "'smm'"),
        ("reg", "l_inf", "'linf'"),
        ("reg", "kurtosis", "'kure'"),
        ("stage", "nearest", "'none'"),
        ("stage", "ada", "'adaround'"),
        ("tracker", "tensorbord", "'tensorboard'"),
    ],
)
def test_an_option_is_known_by_its_name_its_beginning_and_what_it_calls(group, wanted, meant):
    line = unknown_option(group, wanted, OPTIONS[group])
    assert f": did you mean {meant}? choose from {OPTIONS[group][0]}, " in line


FAR = {
    "model": ["resnet50", "mbv3", "vgg16", "mobile", "bert", "efficientnet", "mobilevit", "m", ""],
    "data": ["cifar100", "mnist", "svhn", "coco", "glue", "places365", "inat"],
    "reg": ["l1", "l3", "l10", "none", "max", "kl"],
    "stage": ["qat", "ptq", "gptq", "int8", "fp16", "fp8", "quantize"],
    "recipe": ["paper", "default", "adamw", "fast"],
}


@pytest.mark.parametrize("group, wanted", [(group, word) for group, words in FAR.items() for word in words])
def test_what_is_not_near_is_no_hint(group, wanted):
    line = unknown_option(group, wanted, OPTIONS[group])
    assert "did you mean" not in line and line.endswith(", ".join(OPTIONS[group]))


def test_a_key_is_compared_without_its_group():
    """`recipe.` is most of both, yet says nothing."""
    assert "did you mean" not in unknown_key("recipe.xy", ["recipe.lr", "recipe.epochs"])
    assert "did you mean 'recipe.finetune.lr'? known" in unknown_key("recipe.finetune.lrr", ["recipe.finetune.lr"])


@pytest.mark.parametrize(
    "words, said",
    [
        (
            "stage=fp32 stage.bits=2",
            "it is a key of stage=adaround, dfq, dkm, ewgs, lsq, none, pact; stage=fp32 has no keys",
        ),
        ("stage.bit=2", "did you mean 'stage.bits'? It is a key of stage=adaround, dfq, dkm, ewgs, lsq, none, pact; "),
        ("+stage.bits=2", "it is a key of stage=adaround"),
        ("stage.strength=2", "unknown key 'stage.strength': stage=fp32 has no keys"),
        ("stage=lsq stage.delta=0", "it is a key of stage=ewgs; known are stage.act_bits, "),
        ("reg.wieght=1", "did you mean 'reg.weight'? It is a key of reg=kure, linf, margin, smm; known are reg.factor"),
        ("model=mobilebert data=qnli model.width_mult=1", "it is a key of model=mbv1, mbv2, rn18; known are model.fin"),
        ("model.widht=1", "did you mean 'model.width_mult'? known are"),
        ("bits=2", "did you mean 'stage.bits'? known are check, "),
        ("width=0.5", "did you mean 'model.width_mult'? known are check, "),
        ("epochs=2", "did you mean 'recipe.epochs' or 'stage.epochs'? known are"),
        ("model.bits=2", "did you mean 'stage.bits'? known are model."),
        ("recipe.finetune.epoch=2", "did you mean 'recipe.finetune.epochs'? known are recipe.finetune.ada"),
        ("sead=2", "did you mean 'seed'? known are"),
        ("strength=2", "unknown key 'strength': known are"),
        ("experiment=tabel2", "did you mean 'table2'? choose from figure1"),
    ],
)
def test_a_key_that_the_option_has_not_names_who_has_it(words, said):
    assert said in told(words)
