"""Collect the training text from Debian documentation packages.

Nothing is downloaded here and no text is stored in the repository: the text
comes from packages that the developer has installed:

    apt-get install bible-kjv-text fortunes rust-doc python3-doc

Every source is a list of *groups* (a Bible chapter, a fortune, an HTML page);
each group is a list of *documents* (a passage, a section).  A group is either
wholly used for training or wholly held out, so no page leaks from one side to
the other.  The choice is made by a hash of the group's name and the seed, so
it does not depend on the order in which files are read.

Usage:  python corpus.py --out corpus.json [--seed 1]
"""

import argparse
import glob
import hashlib
import html.parser
import json
import os
import re
import subprocess

FORTUNES = "/usr/share/games/fortunes"
RUST_DOC = "/usr/share/doc/rust-doc/html"
PYTHON_DOC = "/usr/share/doc/python3.11/html"

# Fortune files that are pictures, word games, or crude.
FORTUNES_SKIP = {
    "art", "ascii-art", "translate-me", "ethnic", "men-women", "drugs",
    "politics", "zippy", "knghtbrd", "perl",
}

BOOKS = dict(
    Ge="Genesis", Exo="Exodus", Lev="Leviticus", Num="Numbers",
    Deu="Deuteronomy", Josh="Joshua", Jdgs="Judges", Ruth="Ruth",
    **{"1Sm": "1 Samuel", "2Sm": "2 Samuel", "1Ki": "1 Kings",
       "2Ki": "2 Kings", "1Chr": "1 Chronicles", "2Chr": "2 Chronicles",
       "1Cor": "1 Corinthians", "2Cor": "2 Corinthians",
       "1Th": "1 Thessalonians", "2Th": "2 Thessalonians",
       "1Tim": "1 Timothy", "2Tim": "2 Timothy", "1Pet": "1 Peter",
       "2Pet": "2 Peter", "1Jn": "1 John", "2Jn": "2 John", "3Jn": "3 John"},
    Ezra="Ezra", Neh="Nehemiah", Est="Esther", Job="Job", Psa="Psalm",
    Prv="Proverbs", Eccl="Ecclesiastes", SSol="Song of Solomon",
    Isa="Isaiah", Jer="Jeremiah", Lam="Lamentations", Eze="Ezekiel",
    Dan="Daniel", Hos="Hosea", Joel="Joel", Amos="Amos", Obad="Obadiah",
    Jonah="Jonah", Mic="Micah", Nahum="Nahum", Hab="Habakkuk",
    Zep="Zephaniah", Hag="Haggai", Zec="Zechariah", Mal="Malachi",
    Mat="Matthew", Mark="Mark", Luke="Luke", John="John", Acts="Acts",
    Rom="Romans", Gal="Galatians", Eph="Ephesians", Phi="Philippians",
    Col="Colossians", Titus="Titus", Phmn="Philemon", Heb="Hebrews",
    Jas="James", Jude="Jude", Rev="Revelation",
)


def held_out(source, name, seed, share):
    """Whether a group is held out: a hash, so independent of reading order."""
    digest = hashlib.sha256(f"{seed}/{source}/{name}".encode()).digest()
    return int.from_bytes(digest[:4], "big") < share * 2**32


# --- King James Bible ------------------------------------------------------

def bible():
    """One group per chapter, one document per passage of about ten verses."""
    text = subprocess.run(
        ["bible", "-f", "gen1:1-rev22:21"],
        check=True, capture_output=True, text=True,
    ).stdout
    chapters = {}
    for line in text.splitlines():
        match = re.match(r"(\d?[A-Za-z]+)(\d+):(\d+) (.*)", line)
        if match:
            book, chapter, verse, words = match.groups()
            key = f"{BOOKS.get(book, book)} {chapter}"
            chapters.setdefault(key, []).append((int(verse), words.strip()))
    for key, verses in chapters.items():
        parts = max(1, round(len(verses) / 10))
        documents = []
        for part in range(parts):
            piece = verses[part * len(verses) // parts:
                           (part + 1) * len(verses) // parts]
            documents.append(f"{key}:{piece[0][0]}\n"
                             + " ".join(words for _, words in piece))
        yield key, documents


# --- fortunes --------------------------------------------------------------

def fortunes():
    for path in sorted(glob.glob(FORTUNES + "/*")):
        name = os.path.basename(path)
        if "." in name or name in FORTUNES_SKIP:
            continue
        with open(path, encoding="utf-8", errors="replace") as file:
            text = file.read()
        for i, cookie in enumerate(re.split(r"\n%\n", "\n" + text)):
            cookie = re.sub(r".\x08", "", cookie)         # overstrikes
            cookie = cookie.replace("\t", " ")
            cookie = re.sub(r" {2,}", " ", cookie).strip()
            if 20 <= len(cookie) <= 3000 and "\ufffd" not in cookie:
                yield f"{name}/{i}", [cookie]


# --- HTML documentation ----------------------------------------------------

class Text(html.parser.HTMLParser):
    """HTML to sections of plain text; `inside` says which element to read.

    A heading (h1, h2, h3) begins a new section.  Lines are unwrapped outside
    of <pre>; items of lists begin with "- ".
    """

    VOID = {"br", "hr", "img", "input", "link", "meta", "wbr", "col", "source"}
    SKIP = {"script", "style", "nav", "button", "svg", "table", "summary", "head"}
    BLOCK = {"p", "div", "li", "ul", "ol", "pre", "dt", "dd", "dl",
             "blockquote", "section", "h4", "h5", "h6", "tr"}

    def __init__(self, inside):
        super().__init__(convert_charrefs=True)
        self.inside = inside
        self.stack = []         # [tag, reading, skipping, pre]
        self.sections = [""]

    def state(self):
        return self.stack[-1][1:] if self.stack else [False, False, False]

    def add(self, text):
        self.sections[-1] += text

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        reading, skipping, pre = self.state()
        if tag == "br" and reading and not skipping:
            self.add("\n")
        if tag in self.VOID:
            return
        classes = (attrs.get("class") or "").split()
        reading = reading or self.inside(tag, attrs, classes)
        skipping = (skipping or tag in self.SKIP or "headerlink" in classes
                    or "item-decl" in classes or "buttons" in classes)
        if reading and not skipping:
            if tag in ("h1", "h2", "h3"):
                self.sections.append("")
            elif tag in self.BLOCK:
                self.add("\n")
            if tag == "li":
                self.add("- ")
        # mdbook hides boilerplate lines of examples in such spans.
        skipping = skipping or "boring" in classes
        self.stack.append([tag, reading, skipping, pre or tag == "pre"])

    def handle_endtag(self, tag):
        if tag in self.VOID or not any(s[0] == tag for s in self.stack):
            return
        reading, skipping, _ = self.state()
        if reading and not skipping and (
                tag in self.BLOCK or tag in ("h1", "h2", "h3")):
            self.add("\n")
        while self.stack.pop()[0] != tag:
            pass

    def handle_data(self, data):
        reading, skipping, pre = self.state()
        if reading and not skipping:
            self.add(data.replace("\n", "\x00") if pre
                     else re.sub(r"\s+", " ", data))


def sections(path, inside):
    with open(path, encoding="utf-8", errors="replace") as file:
        parser = Text(inside)
        parser.feed(file.read())
    for text in parser.sections:
        text = text.replace("¶", "").replace("\xa0", " ").replace("\u200b", "")
        for fancy, plain in (("’", "'"), ("‘", "'"), ("“", '"'), ("”", '"')):
            text = text.replace(fancy, plain)
        text = re.sub(r"\n- \s*\n", "\n- ", text)
        text = re.sub(r" *\n[ \n]*", "\n", text)    # no empty lines in prose
        text = text.replace("\x00", "\n")           # lines of code
        text = re.sub(r"[ \t]+\n", "\n", text)
        text = re.sub(r"\n{2,}", "\n", text).strip()
        if len(text) < 200:
            continue
        # Sections of no more than about 2,500 characters, cut at lines.
        piece = ""
        for line in text.split("\n"):
            if len(piece) + len(line) > 2500 and len(piece) > 500:
                yield piece.strip()
                piece = ""
            piece += line + "\n"
        if len(piece) >= 200:
            yield piece.strip()


def readable(text):
    """Prose and code, not tables of symbols or of numbers."""
    letters = sum(c.isalpha() or c == " " for c in text)
    foreign = sum(ord(c) > 126 for c in text)
    return letters > 0.72 * len(text) and foreign < 0.01 * len(text)


def fingerprint(line):
    """A line with its numbers and the names of number types left out."""
    line = re.sub(r"\b[iuf]?(8|16|32|64|128|size)\b|[iu]size|\d", "", line)
    return re.sub(r"\W+", " ", line)


def pages(root, folders, inside):
    """One group per page, without what an earlier page has said already.

    Reference documentation repeats itself (a method on every integer type, a
    trait's methods on every type): a document is dropped when more than 30 %
    of its text are lines that occurred before.  This also keeps the held-out
    pages from being copies of training pages.
    """
    seen = set()
    for folder in folders:
        for path in sorted(glob.glob(f"{root}/{folder}", recursive=True)):
            if os.path.basename(path) in ("print.html", "toc.html", "all.html"):
                continue
            if re.search(r"/std/(arch|simd|intrinsics)/", path):
                continue
            documents = []
            for text in sections(path, inside):
                lines = [line for line in text.split("\n") if line != "Run"]
                text = "\n".join(lines)
                marks = [fingerprint(line) for line in lines]
                known = sum(len(line) for line, mark in zip(lines, marks)
                            if mark in seen and len(line) > 20)
                seen.update(marks)
                if known < 0.3 * len(text) and readable(text):
                    documents.append(text)
            if documents:
                yield os.path.relpath(path, root), documents


def rust_doc():
    books = ["book/*.html", "rust-by-example/**/*.html", "reference/**/*.html",
             "nomicon/*.html", "edition-guide/**/*.html", "rustc/**/*.html",
             "embedded-book/**/*.html"]
    yield from pages(RUST_DOC, books, lambda tag, a, c: tag == "main")
    yield from pages(RUST_DOC, ["std/**/*.html"],
                     lambda tag, a, c: "docblock" in c)


def python_doc():
    folders = ["tutorial/*.html", "howto/*.html", "faq/*.html",
               "whatsnew/3.?.html", "whatsnew/3.1?.html"]
    yield from pages(PYTHON_DOC, folders,
                     lambda tag, a, c: a.get("role") == "main")


SOURCES = {"bible": bible, "fortunes": fortunes, "rust-doc": rust_doc,
           "python-doc": python_doc}


def collect(seed=1, share=0.04):
    """{source: {"train": [text], "held_out": [text]}}"""
    corpus = {}
    for source, read in SOURCES.items():
        sides = {"train": [], "held_out": []}
        for name, documents in read():
            side = "held_out" if held_out(source, name, seed, share) else "train"
            sides[side].extend(documents)
        corpus[source] = sides
    return corpus


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    corpus = collect(args.seed)
    for source, sides in corpus.items():
        for side, documents in sides.items():
            size = sum(map(len, documents))
            print(f"{source:12} {side:9} {len(documents):6} documents "
                  f"{size / 1e6:6.2f} M characters")
    with open(args.out, "w", encoding="utf-8") as file:
        json.dump(corpus, file)


if __name__ == "__main__":
    main()
