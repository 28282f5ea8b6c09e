//! Four styles of tokenizers against what the tokenizers library says of them (tests/parity/make_tokenizers.py).

use super::*;
use serde::Deserialize;

#[derive(Deserialize)]
struct Cases {
    vocab: usize,
    texts: Vec<TextCase>,
    broken: Vec<IdsCase>,
}

#[derive(Deserialize)]
struct TextCase {
    text: String,
    ids: Vec<u32>,
    plain: Vec<u32>,
    decoded: String,
}

#[derive(Deserialize)]
struct IdsCase {
    ids: Vec<u32>,
    decoded: String,
}

const STYLES: [&str; 4] = ["gpt2", "qwen", "llama", "deepseek"];

fn style(name: &str) -> (TextCodec, Cases) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/parity/tokenizers");
    let read = |file: String| std::fs::read(folder.join(file)).expect("a fixture");
    let cases: Cases = serde_json::from_slice(&read(format!("{name}.cases.json"))).expect("cases");
    let bytes = read(format!("{name}.json"));
    let codec = TextCodec::parse(folder.join(name), &bytes, cases.vocab).expect("a tokenizer");
    let error = TextCodec::parse(folder.join(name), &bytes, cases.vocab - 1).err().expect("an id too large");
    assert!(error.to_string().contains("token id"), "{error}");
    (codec, cases)
}

/// The text token by token, each piece of it whole characters, and the pieces.
fn streamed(codec: &TextCodec, ids: &[u32]) -> Vec<String> {
    let mut stream = TextStream::default();
    let mut pieces: Vec<String> = ids.iter().map(|&id| stream.push(codec, id).expect("text")).collect();
    pieces.push(stream.finish(codec).expect("text"));
    pieces
}

#[test]
fn texts_become_the_ids_and_the_texts_that_the_library_says() {
    for name in STYLES {
        let (codec, cases) = style(name);
        assert!(cases.texts.len() > 40);
        for case in cases.texts {
            assert_eq!(codec.encode(&case.text).expect("ids"), case.ids, "{name}: {:?}", case.text);
            assert_eq!(codec.encode_whole(&case.text).expect("ids"), case.plain, "{name}: {:?}", case.text);
            assert_eq!(codec.decode(&case.ids).expect("text"), case.decoded, "{name}: {:?}", case.text);
            let pieces = streamed(&codec, &case.ids);
            assert_eq!(pieces.concat(), case.decoded, "{name}: {:?} in pieces", case.text);
            // A character is never shown in halves: where the text has no replacement character, no piece has.
            let broken = |s: &String| s.contains(BROKEN);
            assert!(case.decoded.contains(BROKEN) || !pieces.iter().any(broken), "{name}: {pieces:?}");
        }
    }
}

#[test]
fn bytes_that_are_no_characters_are_shown_as_the_library_shows_them() {
    for name in STYLES {
        let (codec, cases) = style(name);
        assert!(cases.broken.len() > 100);
        for IdsCase { ids, decoded } in cases.broken {
            assert_eq!(codec.decode(&ids).expect("text"), decoded, "{name}: {ids:?}");
            let pieces = streamed(&codec, &ids).concat();
            match name {
                // Byte fallback takes back whole bytes that broken ones follow; what was shown stays shown.
                "llama" if pieces != decoded => {
                    let letters = |s: &str| s.chars().filter(|c| *c != BROKEN).collect::<String>();
                    assert!(decoded.contains(BROKEN), "{ids:?}: {pieces:?}, not {decoded:?}");
                    let (shown, whole) = (letters(&pieces), letters(&decoded));
                    let mut left = shown.chars();
                    assert!(
                        whole.chars().all(|c| left.any(|d| c == d)),
                        "{ids:?}: {pieces:?} lacks {decoded:?}"
                    );
                }
                _ => assert_eq!(pieces, decoded, "{name}: {ids:?}"),
            }
        }
    }
}

#[test]
fn readable_text_is_not_held_back_for_long() {
    for name in STYLES {
        let (codec, _) = style(name);
        let text = "日本語 and 🦀 crabs, né à Å. ".repeat(8);
        let ids = codec.encode_whole(&text).expect("ids");
        let mut stream = TextStream::default();
        let mut shown = String::new();
        for (i, &id) in ids.iter().enumerate() {
            shown += &stream.push(&codec, id).expect("text");
            let whole = codec.decode(&ids[..=i]).expect("text");
            let readable = whole.trim_end_matches(BROKEN);
            assert!(readable.len() <= shown.len() + 4, "{name}: {shown:?} of {readable:?}");
            assert!(stream.window.len() <= 2 * MOST_HELD, "{name}: decoding takes as long as the text");
        }
    }
    // A stream of nothing but broken bytes does not grow without end.
    let (codec, _) = style("llama");
    let lead = codec.tokenizer.token_to_id("<0xE4>").expect("a byte");
    let mut stream = TextStream::default();
    let mut shown = 0;
    for _ in 0..200 {
        shown += stream.push(&codec, lead).expect("text").chars().count();
        assert!(stream.window.len() <= 3 * MOST_HELD);
    }
    assert!(shown > 150);
}

#[test]
fn files_that_are_no_tokenizers_are_refused_in_words() {
    let (_, cases) = style("llama");
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/parity/tokenizers");
    let whole = std::fs::read(folder.join("llama.json")).expect("a fixture");
    let refused = |bytes: &[u8], what: &str| {
        let path = PathBuf::from("tokenizer.json");
        let error =
            TextCodec::parse(path, bytes, cases.vocab).err().unwrap_or_else(|| panic!("{what} is taken"));
        assert!(error.is_input() && error.to_string().starts_with("tokenizer.json"), "{what}: {error}");
    };
    for cut in [0, 1, whole.len() / 2, whole.len() - 2] {
        refused(&whole[..cut], "a file that is cut");
    }
    refused(&[b"[".repeat(100_000), b"]".repeat(100_000)].concat(), "a deep list");
    refused(br#"{"version":"1.0","model":{"type":"Unknown"}}"#, "a model of no kind");
    let edited = |edit: &dyn Fn(&mut serde_json::Value)| {
        let mut value: serde_json::Value = serde_json::from_slice(&whole).expect("JSON");
        edit(&mut value);
        value.to_string().into_bytes()
    };
    refused(
        &edited(&|t| t["post_processor"]["special_tokens"]["<s>"]["ids"] = serde_json::json!([99_999])),
        "an id that only the template has",
    );
    refused(
        &edited(&|t| t["model"]["vocab"]["zebra"] = serde_json::json!(99_999)),
        "an id past the vocabulary",
    );
    refused(
        &edited(&|t| {
            t["normalizer"] = serde_json::json!({"type": "Precompiled", "precompiled_charsmap": "AQAAAA=="});
        }),
        "a map of characters that is cut",
    );
}
