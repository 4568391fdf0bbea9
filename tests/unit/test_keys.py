"""Where API keys come from, and how a file of them is followed."""

import os

import pytest

from embedmill.errors import ConfigurationError
from worker.keys import KeyFile, keys_from_environment, split_keys

KEY = "jina_0123456789"


def test_the_keys_come_from_the_environment_or_a_file(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"{KEY}\njina_b\n\n{KEY}\n")
    assert keys_from_environment({"JINA_API_KEY": f" {KEY} "}).keys == (KEY,)
    assert keys_from_environment({"JINA_API_KEY": f"{KEY},jina_b\njina_c jina_b"}).keys == (KEY, "jina_b", "jina_c")
    found = keys_from_environment({"JINA_API_KEY_FILE": str(file)})
    assert found.keys == (KEY, "jina_b")
    assert found.file is not None
    with pytest.raises(ConfigurationError, match="JINA_API_KEY_FILE"):
        keys_from_environment({"JINA_API_KEY_FILE": str(tmp_path / "none")})
    with pytest.raises(ConfigurationError, match="get one at https"):
        keys_from_environment({})


@pytest.mark.parametrize("text", ["", " , \n", f"{KEY}\njina_ü", f"{KEY},\x00", "\x1b[0m"])
def test_what_no_key_can_be_is_refused_without_being_shown(text):
    with pytest.raises(ConfigurationError, match="JINA_API_KEY") as caught:
        split_keys(text, place="JINA_API_KEY")
    assert KEY not in str(caught.value)
    assert "ü" not in str(caught.value)


def test_no_key_shows_in_a_dump(tmp_path):
    file = tmp_path / "keys"
    file.write_text(KEY)
    found = keys_from_environment({"JINA_API_KEY_FILE": str(file)})
    assert KEY not in repr(found)


async def test_a_file_that_did_not_change_says_nothing_and_one_that_did_says_its_keys(tmp_path):
    file = KeyFile(tmp_path / "keys")
    file.path.write_text("jina_a")
    assert file.read() == ("jina_a",)
    assert await file.changed() is None
    file.path.write_text("jina_b\njina_c")
    assert await file.changed() == ("jina_b", "jina_c")
    assert await file.changed() is None
    os.utime(file.path, ns=(1, 1))
    assert await file.changed() is None, "touched, with the same keys"


async def test_a_mounted_secret_is_followed_through_the_swap_of_its_link(tmp_path):
    """As the kubelet does: keys -> ..data/keys, ..data -> a folder by time, replaced by a rename."""
    for folder, key in (("one", "jina_a"), ("two", "jina_b")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "keys").write_text(key)
    (tmp_path / "..data").symlink_to("one")
    (tmp_path / "keys").symlink_to("..data/keys")
    file = KeyFile(tmp_path / "keys")
    assert file.read() == ("jina_a",)
    (tmp_path / "..data_tmp").symlink_to("two")
    (tmp_path / "..data_tmp").rename(tmp_path / "..data")
    assert await file.changed() == ("jina_b",)


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe\x00", "jina_ü".encode(), None], ids=["empty", "rubbish", "ü", "gone"]
)
async def test_a_bad_new_file_is_complained_of_once(tmp_path, content):
    file = KeyFile(tmp_path / "keys")
    file.path.write_text("jina_a")
    file.read()
    if content is None:
        file.path.unlink()
    else:
        file.path.write_bytes(content)
    with pytest.raises(ConfigurationError, match="JINA_API_KEY_FILE"):
        await file.changed()
    assert await file.changed() is None
    file.path.write_text("jina_a jina_b")
    assert await file.changed() == ("jina_a", "jina_b")


async def test_a_file_that_is_written_while_it_is_read_counts_at_the_next_look(tmp_path, monkeypatch):
    file = KeyFile(tmp_path / "keys")
    file.path.write_text("jina_a")
    file.read()
    file.path.write_text("jina_b")
    states = iter([(1, 1, 1), (1, 1, 1), (2, 1, 1)])
    with monkeypatch.context() as patch:
        patch.setattr(KeyFile, "_signature", lambda _: next(states))
        assert await file.changed() is None
    assert await file.changed() == ("jina_b",)
