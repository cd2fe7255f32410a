import json

import pytest

from motor_ray.config import RunSettings
from motor_ray.config_values import read_settings, settings_from, settings_hash
from motor_ray.errors import ConfigError


def test_the_defaults_are_the_recipe():
    recipe = RunSettings()
    assert (recipe.model.backbone, recipe.model.pretrained) == ("resnet101", "imagenet")
    assert (recipe.frame.size, recipe.targets.box_pixels, recipe.targets.sigma) == (720, 100, 2)
    assert (recipe.preprocess.clahe_clip, recipe.preprocess.clahe_tiles) == (2.0, 8)
    assert (recipe.augment.rotation_degrees, recipe.augment.scaling, recipe.augment.translation_pixels) == (15, 0.1, 20)
    train = recipe.train
    assert (train.learning_rate, train.weight_decay, train.epochs, train.batch_size) == (2e-4, 1e-5, 100, 4)
    assert (train.clip_norm, train.patience, train.mixed_precision) == (5, 15, True)


def test_a_misspelt_setting_is_refused_with_a_hint():
    with pytest.raises(ConfigError, match=r"detect\.score_treshold: unknown setting; did you mean score_threshold"):
        settings_from({"detect": {"score_treshold": 0.4}})


def test_a_misspelt_group_is_refused_with_a_hint():
    with pytest.raises(ConfigError, match="trian: unknown setting; did you mean train"):
        settings_from({"trian": {"epochs": 3}})


def test_every_wrong_value_is_named_with_what_was_given():
    with pytest.raises(ConfigError, match=r"train\.epochs: .*got 0; detect\.score_threshold: .*got 'high'"):
        settings_from({"train": {"epochs": 0}, "detect": {"score_threshold": "high"}})


@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        (
            {"levels": 2, "neck": "deconvolution"},
            r"model\.levels 2 needs .* model\.neck deconvolution makes .*choose --",
        ),
        (
            {"slice_step_angstrom": 40.0},
            r"slice_step_angstrom 40 says .* model\.in_slices is 1; set --model\.in-slices 3",
        ),
        (
            {"slice_step_angstrom": 40.0, "slice_step": 2, "in_slices": 3},
            r"slice_step_angstrom 40 and model\.slice_step 2 say the same thing",
        ),
        ({"levels": 4}, r"model\.levels: .*got 4"),
        ({"neck": "fpn"}, r"model\.neck: .*'pyramid', 'deconvolution' or 'light'.*got 'fpn'"),
    ],
)
def test_networks_that_make_no_sense_are_refused_with_both_values(model, complaint):
    with pytest.raises(ConfigError, match=complaint):
        settings_from({"model": model})


def test_settings_that_contradict_one_another_are_told_in_a_sentence_without_the_rest():
    with pytest.raises(ConfigError, match=r"^run\.yaml: train: cycles must divide epochs, got 5 and 99$"):
        settings_from({"train": {"schedule": "cyclic", "epochs": 99}}, "run.yaml")
    with pytest.raises(ConfigError, match=r"^run\.yaml: train\.batch_norm frozen keeps[^{]*$"):
        settings_from({"train": {"batch_norm": "frozen"}, "model": {"pretrained": "none"}}, "run.yaml")


def test_settings_cannot_be_changed_in_place():
    with pytest.raises(ValueError, match="frozen"):
        RunSettings().train.epochs = 3  # type: ignore[misc]


def test_settings_survive_json_and_equal_settings_have_equal_hashes():
    changed = settings_from({"train": {"epochs": 3}, "preprocess": {"clip_percentiles": [1, 99]}})
    again = settings_from(json.loads(json.dumps(changed.model_dump(mode="json"))))
    assert again == changed
    assert settings_hash(again) == settings_hash(changed) != settings_hash(RunSettings())


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("train: {epochs: 3", "is not YAML"), ("- 1\n- 2", "holds a list"), ("train: [1]", "train: .*got")],
)
def test_a_settings_file_that_is_not_one_is_refused(tmp_path, text, complaint):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"run\.yaml: .*{complaint}|run\.yaml: {complaint}"):
        read_settings(path)


def test_a_missing_settings_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read"):
        read_settings(tmp_path / "none.yaml")


def test_an_empty_settings_file_changes_nothing(tmp_path):
    (tmp_path / "run.yaml").write_text("# nothing yet\n")
    assert read_settings(tmp_path / "run.yaml") == RunSettings()
