//! Chat templates as they stand beside models: Jinja, read the way transformers reads it.

use crate::EngineError;
use minijinja::value::{Kwargs, Value};
use minijinja::{Environment, Error, ErrorKind, context};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// What one side of a chat said.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user` or `assistant`, as a rule.
    pub role: String,
    /// The text.
    pub content: String,
}

impl Message {
    /// A message of `role`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

/// A model's chat template.
pub struct ChatTemplate {
    path: PathBuf,
    environment: Environment<'static>,
    bos_token: String,
    eos_token: String,
}

/// `tokenizer_config.json`, null where there is none.
struct Config {
    path: PathBuf,
    value: serde_json::Value,
}

impl Config {
    fn read(folder: &Path) -> Result<Self, EngineError> {
        let path = folder.join("tokenizer_config.json");
        let malformed = |e| EngineError::file(&path, format!("not JSON: {e}"), "copy the model anew");
        let value = match read(&path)? {
            Some(text) => serde_json::from_str(&text).map_err(malformed)?,
            None => serde_json::Value::Null,
        };
        Ok(Self { path, value })
    }
}

const NAME: &str = "chat";
/// No real template or configuration comes near it; a larger one is not read.
const MAX_BYTES: u64 = 16 << 20;
/// Work of a template, in instructions of its interpreter; a template that takes more is stopped.
const FUEL: u64 = 50_000_000;

impl ChatTemplate {
    /// Reads `folder/chat_template.jinja`, or `chat_template` of `folder/tokenizer_config.json`.
    ///
    /// # Errors
    /// Where the model has none, or where it is malformed.
    pub fn open(folder: &Path) -> Result<Self, EngineError> {
        let own = folder.join("chat_template.jinja");
        let config = Config::read(folder)?;
        let (path, source) = match read(&own)? {
            Some(source) => (own, source),
            None => {
                let source = template_of(&config.value["chat_template"]).ok_or_else(|| {
                    let remedy = "use a model that was tuned for chats, or leave --chat out";
                    EngineError::file(folder, "has no chat template", remedy)
                })?;
                (config.path.clone(), source)
            }
        };
        Self::compile(path, source, &config.value)
    }

    /// Reads `template` in place of the one of `folder`, whose special tokens it uses.
    ///
    /// # Errors
    /// Where one of the files is missing or malformed.
    pub fn from_file(folder: &Path, template: &Path) -> Result<Self, EngineError> {
        let missing = || EngineError::file(template, "missing", "give a chat template in Jinja");
        let source = read(template)?.ok_or_else(missing)?;
        Self::compile(template.to_owned(), source, &Config::read(folder)?.value)
    }

    fn compile(path: PathBuf, source: String, config: &serde_json::Value) -> Result<Self, EngineError> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |text: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, text))
        });
        environment.add_function("strftime_now", strftime_now);
        environment.add_filter("tojson", tojson);
        environment.add_template_owned(NAME, source).map_err(|e| malformed(&path, &e))?;
        let token = |name: &str| {
            let value = &config[name];
            value.as_str().or(value["content"].as_str()).unwrap_or_default().to_owned()
        };
        Ok(Self { path, environment, bos_token: token("bos_token"), eos_token: token("eos_token") })
    }

    /// The text of a chat, up to where the assistant speaks next.
    ///
    /// # Errors
    /// Where the template refuses the messages, with its own words.
    pub fn render(&self, messages: &[Message]) -> Result<String, EngineError> {
        let template = self.environment.get_template(NAME).map_err(|e| malformed(&self.path, &e))?;
        let values = context! {
            messages => messages,
            add_generation_prompt => true,
            bos_token => self.bos_token,
            eos_token => self.eos_token,
        };
        template.render(values).map_err(|e| {
            let what = format!(
                "the chat template refuses the messages: {}",
                e.detail().unwrap_or("no reason given")
            );
            EngineError::file(&self.path, what, "try other roles, or leave --system out")
        })
    }
}

fn malformed(path: &Path, error: &Error) -> EngineError {
    EngineError::file(path, format!("no chat template: {error}"), "copy the model anew")
}

/// The file's text; `None` where there is no such file.
fn read(path: &Path) -> Result<Option<String>, EngineError> {
    let again = "copy the model anew";
    match std::fs::metadata(path) {
        Err(_) => Ok(None),
        Ok(data) if data.len() > MAX_BYTES => {
            Err(EngineError::file(path, format!("{} bytes, too large", data.len()), again))
        }
        Ok(_) => std::fs::read_to_string(path)
            .map(Some)
            .map_err(|e| EngineError::file(path, format!("cannot be read: {e}"), again)),
    }
}

/// A template as a string, or the default one of a list of named ones.
fn template_of(value: &serde_json::Value) -> Option<String> {
    let named = || {
        let default = value.as_array()?.iter().find(|t| t["name"] == "default")?;
        default["template"].as_str()
    };
    value.as_str().or_else(named).map(str::to_owned)
}

/// JSON as Python writes it: a blank behind commas and colons, other letters as they are, no HTML escapes.
fn tojson(value: Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let wrong = |e: serde_json::Error| Error::new(ErrorKind::InvalidOperation, e.to_string());
    let mut out = Vec::new();
    match indent {
        Some(width) => {
            let blanks = " ".repeat(width.min(16));
            let formatter = serde_json::ser::PrettyFormatter::with_indent(blanks.as_bytes());
            value
                .serialize(&mut serde_json::Serializer::with_formatter(&mut out, formatter))
                .map_err(wrong)?;
        }
        None => {
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, Python)).map_err(wrong)?;
        }
    }
    Ok(Value::from_safe_string(String::from_utf8_lossy(&out).into_owned()))
}

struct Python;

impl serde_json::ser::Formatter for Python {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, out: &mut W) -> std::io::Result<()> {
        out.write_all(b": ")
    }
}

/// Today's date in the few forms that templates ask for; UTC.
fn strftime_now(format: &str) -> Result<String, Error> {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let (year, month, day) = civil(now.as_secs() / 86_400);
    let name = MONTHS[month as usize - 1];
    let mut out = String::new();
    let mut letters = format.chars();
    while let Some(letter) = letters.next() {
        match (letter, if letter == '%' { letters.next() } else { None }) {
            ('%', Some('Y')) => out += &year.to_string(),
            ('%', Some('m')) => out += &format!("{month:02}"),
            ('%', Some('d')) => out += &format!("{day:02}"),
            ('%', Some('B')) => out += name,
            ('%', Some('b')) => out += &name[..3],
            ('%', other) => {
                let what = format!("strftime_now knows %Y %m %d %B %b, not %{}", other.unwrap_or(' '));
                return Err(Error::new(ErrorKind::InvalidOperation, what));
            }
            _ => out.push(letter),
        }
    }
    Ok(out)
}

/// Year, month and day of a day since 1970-01-01 (Hinnant, "chrono-compatible low-level date algorithms", 2014).
fn civil(days: u64) -> (u64, u64, u64) {
    let z = days + 719_468;
    let (era, of_era) = (z / 146_097, z % 146_097);
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let shifted = (5 * of_year + 2) / 153;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    (year + era * 400 + u64::from(month <= 2), month, of_year - (153 * shifted + 2) / 5 + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(config: &str, own: Option<&str>) -> tempfile::TempDir {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::write(folder.path().join("tokenizer_config.json"), config).expect("writes");
        if let Some(template) = own {
            std::fs::write(folder.path().join("chat_template.jinja"), template).expect("writes");
        }
        folder
    }

    const TURNS: &str = "{{ bos_token }}\n{%- for m in messages %}\n  {%- if m['role'] == 'system' and not loop.first %}\n    \
        {{- raise_exception('system comes first') }}\n  {%- endif %}\n  \
        {{- '<|' + m.role + '|>' + m.content.strip() + eos_token }}\n{%- endfor %}\n\
        {%- if add_generation_prompt %}\n{{- '<|assistant|>' }}\n{%- endif %}";

    #[test]
    fn a_chat_is_written_as_its_template_says() {
        let config =
            serde_json::json!({"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": TURNS});
        let template = ChatTemplate::open(folder(&config.to_string(), None).path()).expect("a template");
        let chat = [Message::new("system", "Be brief."), Message::new("user", "  <Hi> & bye ")];
        let text = template.render(&chat).expect("a text");
        assert_eq!(text, "<s><|system|>Be brief.</s><|user|><Hi> & bye</s><|assistant|>");
        let error = template.render(&[chat[1].clone(), chat[0].clone()]).expect_err("refused").to_string();
        assert!(error.contains("system comes first"), "{error}");
    }

    #[test]
    fn a_file_of_its_own_comes_first_and_lists_have_a_default() {
        let list = r#"{"chat_template": [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]}"#;
        let chat = [Message::new("user", "x")];
        assert_eq!(
            ChatTemplate::open(folder(list, None).path()).expect("list").render(&chat).expect("text"),
            "yes"
        );
        let own = folder(list, Some("{{ {'a': [1, 'é<'], 'b': none} | tojson }}"));
        let text = ChatTemplate::open(own.path()).expect("own").render(&chat).expect("text");
        assert_eq!(text, r#"{"a": [1, "é<"], "b": null}"#);
    }

    #[test]
    fn what_is_no_template_is_named() {
        for (config, own, names) in [
            ("{}", None, "no chat template"),
            ("[", None, "not JSON"),
            ("{}", Some("{% if %}"), "no chat template"),
            (r#"{"chat_template": 7}"#, None, "no chat template"),
        ] {
            let error = ChatTemplate::open(folder(config, own).path()).err().expect(config).to_string();
            assert!(error.contains(names), "{error}");
        }
        let endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}";
        let template = ChatTemplate::open(folder("{}", Some(endless)).path()).expect("reads");
        assert!(template.render(&[]).is_err(), "it is stopped");
    }

    #[test]
    fn days_are_dates() {
        assert_eq!(civil(0), (1970, 1, 1));
        assert_eq!(civil(19_782), (2024, 2, 29));
        assert_eq!(civil(20_454), (2026, 1, 1));
        assert!(strftime_now("%d %b %Y").is_ok() && strftime_now("%H").is_err());
    }
}
