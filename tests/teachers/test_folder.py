import os

import pytest

from teachers.folder import new_file, new_folder, renewed_folder


def test_who_has_a_file_open_keeps_it(tmp_path):
    with renewed_folder(tmp_path / "kept") as staging:
        (staging / "weights").write_text("old" * 1000)
    with (tmp_path / "kept" / "weights").open() as opened:
        with renewed_folder(tmp_path / "kept") as staging:
            (staging / "weights").write_text("new")
        assert opened.read() == "old" * 1000
    assert (tmp_path / "kept" / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def fail_half_way(path):
    path.write_text("half")
    raise RuntimeError


def test_after_an_error_all_is_as_it_was(tmp_path):
    (tmp_path / "file").write_text("before")
    with pytest.raises(RuntimeError), new_file(tmp_path / "file") as staging:
        fail_half_way(staging)
    for folder in (renewed_folder, new_folder):
        with pytest.raises(RuntimeError), folder(tmp_path / "new") as staging:
            fail_half_way(staging / "weights")
    assert (tmp_path / "file").read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_replaces_another_does_so_as_a_whole(tmp_path):
    for content in ("old", "new"):
        with new_folder(tmp_path / "kept", replaces=True) as staging:
            (staging / "parts").mkdir()
            (staging / "parts" / content).touch()
    with pytest.raises(RuntimeError), new_folder(tmp_path / "kept", replaces=True) as staging:
        fail_half_way(staging / "weights")
    assert [path.name for path in (tmp_path / "kept").rglob("*")] == ["parts", "new"]
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def replace_but_fail_at_the_second(monkeypatch, output, error):
    replace, calls = os.replace, []

    def failing(source, target):
        calls.append(source)
        if len(calls) == 2 or (error is SystemExit and len(calls) > 2):  # one that was killed does nothing more
            raise error
        replace(source, target)

    monkeypatch.setattr("teachers.folder.os.replace", failing)
    with pytest.raises(error), new_folder(output, replaces=True) as staging:
        (staging / "new").touch()
    monkeypatch.undo()


def test_a_folder_that_could_not_be_replaced_is_put_back(tmp_path, monkeypatch):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "old").touch()
    replace_but_fail_at_the_second(monkeypatch, tmp_path / "kept", OSError)
    assert [path.name for path in tmp_path.rglob("*")] == ["kept", "old"]


def test_a_folder_that_a_process_was_killed_at_replacing_is_put_back_by_the_next(tmp_path, monkeypatch):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "old").touch()
    replace_but_fail_at_the_second(monkeypatch, tmp_path / "kept", SystemExit)
    assert not (tmp_path / "kept").exists()
    with pytest.raises(RuntimeError), new_folder(tmp_path / "kept", replaces=True):
        raise RuntimeError
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["old"]
    with new_folder(tmp_path / "kept", replaces=True) as staging:
        (staging / "new").touch()
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["new"]


def test_of_a_shared_folder_the_first_stays(tmp_path):
    """Where there are no locks two processes may make the same one."""
    output = tmp_path / "made"
    with new_folder(output, shared=True) as slow:
        (slow / "by").write_text("the slow one")
        with new_folder(output, shared=True) as fast:
            (fast / "by").write_text("the fast one")
    assert (output / "by").read_text() == "the fast one"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
