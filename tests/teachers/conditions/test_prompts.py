import datasets
import pytest

from teachers.conditions.prompts import PromptConfig, load_prompts


def prompts_of(folder, values, split="train"):
    datasets.Dataset.from_dict({"text": values}).to_parquet(folder / "train.parquet")
    return load_prompts(PromptConfig(name=str(folder), split=split))


def test_of_several_captions_the_first_is_the_prompt(tmp_path):
    assert prompts_of(tmp_path, [["a car", "a red car"], ["a house\n"]]) == ["a car", "a house "]


def test_a_row_without_a_prompt_is_named(tmp_path):
    for values in (["a car", "b", None], [["a car"], ["b"], []]):
        with pytest.raises(ValueError, match=r"1 rows .* the first is row 2"):
            prompts_of(tmp_path, values)


def test_prompts_of_a_part_of_a_split(tmp_path):
    assert prompts_of(tmp_path, ["a", "b", "c"], "train[1:]") == ["b", "c"]
