"""Building corpora: readers on miniature packages, sentence splitting, held-out splits, and errors."""

from __future__ import annotations

import json
import os
import shutil
import sys

import pytest

from condgen_fast import cli
from condgen_fast.data import corpus
from condgen_fast.data.debian import descriptions, ding, libreoffice_help, packages
from condgen_fast.data.held_out import split
from condgen_fast.data.sentences import Row, aligned_rows, is_translation, normalise, split_sentences, tidy
from condgen_fast.data.text import read_lines

NUMBERS = "one two three four five six seven eight nine ten".split()
WORDS = "window table chart menu file page cell text style frame".split()


def letters(start: int, step: int) -> str:
    """A word of nine letters."""
    return "".join(chr(97 + (start + step * k) % 26) for k in range(9))


def fake_packages(folder) -> packages.Packages:
    """Help pages and a dictionary of a few hundred different sentences, as the packages lay them out."""
    root = folder / "root"
    for language, opening in (("en", "Open the {} {} of {}."), ("de", "Öffnen Sie {} {} aus {}.")):
        package, code = libreoffice_help.package(language), libreoffice_help.LANGUAGES[language][1]
        pages = root / package / "usr/share/libreoffice/help" / code / "text"
        pages.mkdir(parents=True)
        for page in range(60):
            a, b = WORDS[page % 10], NUMBERS[page // 10]
            if language == "de":
                a, b = a[::-1], b[::-1]
            body = "".join(
                f'<p id="par_{i}" class="x">{opening.format(b, a, letters(page * 7, i))}</p>' for i in range(8)
            )
            (pages / f"page{page}.html").write_text(
                f'<p id="menu">Contents of the menu bar</p><div id="DisplayArea">{body}</div>', encoding="utf-8"
            )
    dictionary = root / ding.PACKAGE / "usr/share/trans"
    dictionary.mkdir(parents=True)
    (dictionary / "de-en").write_text(
        "# comment\n"
        "Haus {n} | Das Haus brennt. (laut) | Gib jdm. etw. :: house | The house is on fire. | Give sb. sth.\n"
        "a | b :: c\n",
        encoding="utf-8",
    )
    return packages.Packages(folder / "lists", root)


INDEX = {
    "*_main_binary-*_Packages*": "Package: libfoo1\nSource: foo (1.2)\n\nPackage: bar\n",
    "*_i18n_Translation-en*": (
        "Package: libfoo1\nDescription-md5: 11\nDescription-en: library for foos\n First paragraph of the text,\n"
        " which goes on.\n .\n  * a first bullet\n    that goes on\n  * second bullet\n .\n   verbatim code\n\n"
        "Package: bar\nDescription-md5: 22\nDescription-en: tool for bars\n Only text.\n"
    ),
    "*_i18n_Translation-de*": (
        "Package: libfoo1\nDescription-md5: 11\nDescription-de: Bibliothek für Foos\n Erster Absatz des SIP-\n"
        " Textes, der weitergeht.\n .\n  * erster Punkt\n  * zweiter Punkt\n .\n   wörtlich\n"
    ),
}


class FakeIndex:
    def index(self, pattern: str) -> str:
        return INDEX[pattern]


def test_descriptions():
    found = descriptions.read(FakeIndex(), ["en", "de"])
    units = list(descriptions.units(found))
    assert [(u.group, u.text["en"], u.text["de"]) for u in units] == [
        ("ddtp:foo", "library for foos", "Bibliothek für Foos"),
        ("ddtp:foo", "First paragraph of the text, which goes on.", "Erster Absatz des SIP-Textes, der weitergeht."),
        ("ddtp:foo", "a first bullet that goes on", "erster Punkt"),
        ("ddtp:foo", "second bullet", "zweiter Punkt"),
    ]
    assert descriptions.paragraphs("   verbatim\n .\n text\n") == [None, "text"]
    (headline,) = descriptions.headlines(found)
    assert headline.text["tgt"] == "library for foos" and headline.text["src"].startswith("First paragraph")


def test_libreoffice_help(tmp_path):
    fake = fake_packages(tmp_path)
    units = list(libreoffice_help.units(fake, ["en", "de"]))
    assert len(units) == 60 * 8 and units[0].group == "lo:page0.html"
    assert units[0].text == {"en": "Open the one window of aaaaaaaaa.", "de": "Öffnen Sie eno wodniw aus aaaaaaaaa."}
    page = fake.root / libreoffice_help.package("en") / "usr/share/libreoffice/help/en-US/text/page0.html"
    page.write_text(
        'id="DisplayArea"<p id="par_0">Choose<span class="m">File</span>now &amp; <b>go</b></p>'
        '<p id="par_1">A <switchinline>B</switchinline></p>'
    )
    changed = {u.group + u.text["en"]: u for u in libreoffice_help.units(fake, ["en", "de"]) if "page0." in u.group}
    assert list(changed) == ["lo:page0.htmlChoose File now & go"]


def test_ding(tmp_path):
    (unit,) = ding.units(fake_packages(tmp_path))
    assert unit.text == {"en": "The house is on fire.", "de": "Das Haus brennt."} and unit.source == "ding"


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        ("See e.g. Writer. It works.", ["See e.g. Writer.", "It works."]),
        ('Das ist z. B. Calc. "Ja." Nein.', ["Das ist z. B. Calc.", '"Ja."', "Nein."]),
        ("version 1. 5 and lower. case", ["version 1.", "5 and lower. case"]),
        ("", []),
        ("no end", ["no end"]),
    ],
)
def test_split_sentences(text, sentences):
    assert split_sentences(text) == sentences


def test_tidy_and_normalise():
    assert tidy(" a\u00a0b\u00ad c\n\td ") == "a b c d"
    assert normalise("Open 12 Files, now!") == normalise("open 7 files now") == "open 0 files now"


@pytest.mark.parametrize(
    ("english", "german", "kept"),
    [
        ("Open the file now.", "Öffnen Sie die Datei jetzt.", True),
        ("Open file", "Datei öffnen", False),  # short
        ("Open the file now.", "Open the file now.", False),
        ("Open the file now.", "Open the file jetzt.", False),  # untranslated
        ("Open the file now.", "ja " * 40, False),
        ("a = (1 + 2) * [3]", "b = 12345 % 678", False),  # code
    ],
)
def test_is_translation(english, german, kept):
    assert is_translation(english, german) == kept


def test_rows_fall_back_to_whole_units_and_english_is_unique():
    units = [
        ("lo", "a", {"en": "Open the file. Close the window.", "de": "Datei jetzt öffnen. Das Fenster schließen."}),
        ("lo", "b", {"en": "Save the text. Print the page.", "de": "Den Text speichern und die Seite drucken."}),
        ("ding", "c", {"en": "open the FILE", "de": "Öffne die Datei"}),
        ("ding", "d", {"en": "A sentence without German."}),
    ]
    rows = aligned_rows(units, ["en", "de"])
    assert [row.text[0] for row in rows] == [
        "Open the file.", "Close the window.", "Save the text. Print the page.",
    ]  # fmt: skip
    assert rows[0].source == "lo"


def rows_of(groups: int, per_group: int) -> list[Row]:
    def word(*numbers: int) -> str:
        return "".join(chr(97 + (n * 11 + k * 5) % 26) for k, n in enumerate(numbers * 3))

    return [
        Row("lo", f"g{g}", (" ".join(word(g, i, k, g // 26) for k in range(6)), f"{word(g)} {word(i, g)} {g} {i}"))
        for g in range(groups)
        for i in range(per_group)
    ]


def test_split_keeps_groups_whole_and_drops_near_duplicates():
    rows = rows_of(300, 4)
    clean = split(rows, 20)
    assert 0 < len(clean.valid) <= 20 and 0 < len(clean.test) <= 20
    groups = [{row.group for row in part} for part in clean[:3]]
    assert not groups[0] & groups[1] and not groups[0] & groups[2] and not groups[1] & groups[2]
    assert split(rows[::-1], 20).test == clean.test  # whatever order the rows come in

    held, train = clean.test[0], clean.train[0].group
    near = Row("lo", train, (held.text[0].rsplit(" ", 1)[0] + " changed", "etwas anderes hier"))
    same_target = Row("lo", train, ("quite another english sentence indeed", held.text[1].upper()))
    again = split([*rows, near, same_target], 20)
    assert held in again.test and near not in again.train and same_target not in again.train
    assert again.near_duplicates == clean.near_duplicates + 1

    template = [near._replace(text=(f"{near.text[0]} {w}", f"anderes Wort {w}")) for w in NUMBERS]
    last = split([*rows, *template], 20)
    assert held not in last.test and all(row in last.train for row in template)


def test_split_of_nothing():
    assert split([], 10) == ([], [], [], 0, 0)


@pytest.fixture
def fake_fetch(monkeypatch, tmp_path):
    fake = fake_packages(tmp_path / "fake")
    monkeypatch.setattr(packages.Packages, "index", lambda self, pattern: INDEX[pattern])
    asked = []

    def fetch(work, names, languages, *, offline):
        asked.append((list(names), list(languages), offline))
        return fake

    monkeypatch.setattr(corpus, "fetch", fetch)
    return asked


def test_build_writes_aligned_files_and_the_same_bytes_again(tmp_path, fake_fetch):
    stats = corpus.build(tmp_path / "one", tmp_path / "work", ["en-de", "libreoffice-en-de"], held=10)
    names, languages, offline = fake_fetch[0]
    assert names == ["libreoffice-help-de", "libreoffice-help-en-us", "trans-de-en"]
    assert languages == ["en", "de"] and not offline
    corpus.build(tmp_path / "two", tmp_path / "work", ["en-de"], held=10)
    corpus.build(tmp_path / "two", tmp_path / "work", ["libreoffice-en-de"], held=10)
    written = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file())
    assert len(written) == 2 * 9 + 1
    for path in written:
        assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes()
    assert json.loads((tmp_path / "one" / "stats.json").read_text()) == stats
    for part in ("train", "valid", "test"):
        sides = {e: read_lines(tmp_path / "one" / "en-de" / f"{part}.{e}") for e in ("en", "de", "meta")}
        assert len(sides["en"]) == len(sides["de"]) == len(sides["meta"]) == stats["en-de"][part] > 0
        help_only = [e for e, m in zip(sides["en"], sides["meta"], strict=True) if m.startswith("lo\t")]
        assert help_only == read_lines(tmp_path / "one" / "libreoffice-en-de" / f"{part}.en")


def test_headline(tmp_path, fake_fetch):
    stats = corpus.build(tmp_path / "out", tmp_path / "work", ["headline"], held=10)
    assert fake_fetch == [([], ["en"], False)]
    assert sum(stats["headline"][part] for part in ("train", "valid", "test")) == 1


def test_unknown_task_names_the_nearest(tmp_path):
    with pytest.raises(ValueError, match="got 'de-en'; did you mean"):
        corpus.build(tmp_path, tmp_path, ["de-en"])
    with pytest.raises(ValueError, match="held must be at least 1; got 0"):
        corpus.build(tmp_path, tmp_path, ["en-de"], held=0)


def test_without_apt_the_command_says_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    status = cli.main(["corpus", "--tasks", "en-de", "--output", str(tmp_path / "o"), "--work", str(tmp_path / "w")])
    assert status == 1 and not (tmp_path / "w").exists()
    assert "needs Debian or Ubuntu; not found: apt-get, dpkg-deb" in capsys.readouterr().err


@pytest.fixture
def fake_tools(monkeypatch, tmp_path):
    """apt-get and dpkg-deb that do as the environment says, in place of the real ones."""
    monkeypatch.setattr(shutil, "which", lambda tool: tool)
    monkeypatch.setattr(packages, "SOURCE_LISTS", (str(tmp_path),))

    def make(apt: str = "", dpkg: str = "") -> None:
        for name, body in (("apt-get", apt), ("dpkg-deb", dpkg)):
            script = tmp_path / "bin" / name
            script.parent.mkdir(exist_ok=True)
            script.write_text(f"#!{sys.executable}\nimport os, sys\n{body}\n")
            script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")

    return make


def test_an_apt_error_is_passed_on(tmp_path, fake_tools):
    fake_tools(apt="sys.exit('E: Temporary failure resolving the mirror')")
    with pytest.raises(RuntimeError, match="apt-get -qq update failed with status 1: E: Temporary failure resolving"):
        packages.fetch(tmp_path / "work", ["p"], ["en"])


def test_offline_names_what_is_missing(tmp_path, fake_tools):
    fake_tools(apt="sys.exit(9)")
    with pytest.raises(FileNotFoundError, match="no package p in"):
        packages.fetch(tmp_path / "work", ["p"], ["en"], offline=True)
    with pytest.raises(FileNotFoundError, match="no package index"):
        packages.fetch(tmp_path / "work", [], ["en"], offline=True).index("*Packages*")


def test_an_interrupted_unpacking_is_done_again(tmp_path, fake_tools):
    download = "open('p_1.deb', 'w') if 'download' in sys.argv else None"
    fake_tools(apt=download, dpkg="os.makedirs(sys.argv[3]); sys.exit('no space left')")
    with pytest.raises(RuntimeError, match="no space left"):
        packages.fetch(tmp_path / "work", ["p"], ["en"])
    fake_tools(apt=download, dpkg="os.makedirs(sys.argv[3]); open(sys.argv[3] + '/file', 'w')")
    fetched = packages.fetch(tmp_path / "work", ["p"], ["en"], offline=True)
    assert [p.name for p in fetched.root.iterdir()] == ["p"] and (fetched.root / "p" / "file").exists()
