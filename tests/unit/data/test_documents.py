"""Documents: what of them is looked at to tell one from another, and what is empty."""

from lowlat.data.documents import ChatDocument, TextDocument


def text_of(*pieces: str) -> TextDocument:
    return TextDocument(origin="x", pieces=lambda: pieces, source_bytes=0)


def test_fingerprints_are_of_the_text() -> None:
    assert text_of("é", "b").fingerprint() == text_of("éb").fingerprint()
    assert text_of("éb").fingerprint()[1:] == (3, True)
    assert text_of("éb").fingerprint()[0] != text_of("eb").fingerprint()[0]
    assert text_of(" \n", "\t").fingerprint()[2] is False
    assert text_of().fingerprint()[1:] == (0, False)


def test_a_chat_without_an_answer_is_empty() -> None:
    asked = {"role": "user", "content": "hi"}
    chat = ChatDocument(origin="x", messages=[asked], tools=None, source_bytes=0)
    assert chat.fingerprint()[2] is False
    told = [{"content": "hi", "role": "user"}, {"role": "assistant", "content": "ho"}]
    answered = ChatDocument(origin="x", messages=told, tools=None, source_bytes=0)
    assert answered.fingerprint()[2] is True
    assert answered.fingerprint()[0] != chat.fingerprint()[0]
    assert list(answered.texts()) == ["hi", "ho"]
