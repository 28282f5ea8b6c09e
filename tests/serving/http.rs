//! The server over real connections, on a tiny model whose every byte is a token.

use crate::common::tiny::{Folder, Tiny};
use crate::common::{Setup, prepare};
use exflow::engine::{Engine, EngineOptions, Strategy};
use exflow::serve::{ServeOptions, Server};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::sync::mpsc::channel;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

const TEMPLATE: &str = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}a:";

/// A server on a thread of its own.
struct Served {
    address: SocketAddr,
    engine: Engine,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
    _folder: Folder,
}

impl Served {
    fn start(edit: impl FnOnce(&mut ServeOptions, &mut EngineOptions)) -> Self {
        prepare();
        let folder = Tiny { layers: 2, experts: 4, positions: 128, seed: 3, ..Tiny::default() }.write();
        std::fs::write(folder.file("chat_template.jinja"), TEMPLATE).expect("writes");
        let (mut options, mut engine_options) = (ServeOptions::new("tiny"), EngineOptions::default());
        edit(&mut options, &mut engine_options);
        let cluster = Setup::new(folder.path(), 2, Strategy::Coherent).start();
        let engine = Engine::over(cluster, engine_options).expect("an engine");
        let (stop, stopped) = oneshot::channel::<()>();
        let (told, address) = channel();
        let served = engine.clone();
        let run = async move {
            let server = Server::bind(served, options).await.expect("listens");
            told.send(server.address()).expect("told");
            server.run(async { drop(stopped.await) }).await.expect("runs");
        };
        let thread = std::thread::spawn(|| {
            tokio::runtime::Runtime::new().expect("threads").block_on(run);
        });
        let address = address.recv().expect("it listens");
        Self { address, engine, stop: Some(stop), thread: Some(thread), _folder: folder }
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// Status and body, whatever the status.
    fn post(&self, path: &str, body: &str) -> (u16, Value) {
        let answer =
            agent().post(self.url(path)).content_type("application/json").send(body).expect("an answer");
        read(answer)
    }

    fn get(&self, path: &str) -> (u16, Value) {
        read(agent().get(self.url(path)).call().expect("an answer"))
    }

    fn text(&self, path: &str) -> String {
        agent().get(self.url(path)).call().expect("an answer").body_mut().read_to_string().expect("text")
    }

    /// The data of every event of a streamed answer.
    fn streamed(&self, path: &str, body: &Value) -> Vec<String> {
        let answer = agent()
            .post(self.url(path))
            .content_type("application/json")
            .send(body.to_string())
            .expect("an answer");
        assert_eq!(answer.status().as_u16(), 200);
        assert_eq!(answer.headers()["content-type"], "text/event-stream");
        let lines = BufReader::new(answer.into_body().into_reader()).lines();
        lines.filter_map(|line| line.expect("a line").strip_prefix("data: ").map(str::to_owned)).collect()
    }

    fn until(&self, what: &str, so: impl Fn(&exflow::engine::LiveStats) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !so(&self.engine.live()) {
            assert!(Instant::now() < deadline, "{what}: {:?}", self.engine.live());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn close(&mut self) {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
        if let Some(thread) = self.thread.take() {
            thread.join().expect("no panic");
        }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.close();
        }
    }
}

fn agent() -> ureq::Agent {
    ureq::Agent::config_builder().http_status_as_error(false).build().into()
}

fn read(mut answer: ureq::http::Response<ureq::Body>) -> (u16, Value) {
    let status = answer.status().as_u16();
    let text = answer.body_mut().read_to_string().expect("text");
    (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
}

fn completion(fields: Value) -> Value {
    let mut body =
        json!({ "model": "tiny", "prompt": "abc", "max_tokens": 12, "temperature": 0, "ignore_eos": true });
    body.as_object_mut().expect("an object").extend(fields.as_object().expect("an object").clone());
    body
}

#[test]
fn answers_whole_and_streamed_say_the_same() {
    let served = Served::start(|_, _| {});
    let (status, whole) = served.post("/v1/completions", &completion(json!({})).to_string());
    assert_eq!(status, 200, "{whole}");
    assert_eq!((&whole["object"], &whole["model"]), (&json!("text_completion"), &json!("tiny")));
    let choice = &whole["choices"][0];
    assert_eq!(choice["finish_reason"], "length");
    assert_eq!(whole["usage"], json!({ "prompt_tokens": 3, "completion_tokens": 12, "total_tokens": 15 }));

    let asked = completion(json!({ "stream": true, "stream_options": { "include_usage": true } }));
    let mut events = served.streamed("/v1/completions", &asked);
    assert_eq!(events.pop().as_deref(), Some("[DONE]"));
    let chunks: Vec<Value> = events.iter().map(|e| serde_json::from_str(e).expect("JSON")).collect();
    let text: String = chunks.iter().filter_map(|c| c["choices"][0]["text"].as_str()).collect();
    assert_eq!(json!(text), choice["text"]);
    let last = chunks.last().expect("chunks");
    assert_eq!((&last["choices"], &last["usage"]), (&json!([]), &whole["usage"]));
    assert_eq!(chunks[chunks.len() - 2]["choices"][0]["finish_reason"], "length");

    let messages = json!([{ "role": "system", "content": "x" }, { "role": "user", "content": "abc" }]);
    let chat = json!({ "messages": messages, "max_tokens": 8, "temperature": 0, "ignore_eos": true });
    let (status, said) = served.post("/v1/chat/completions", &chat.to_string());
    assert_eq!(status, 200, "{said}");
    assert_eq!(
        (&said["object"], &said["choices"][0]["message"]["role"]),
        (&json!("chat.completion"), &json!("assistant"))
    );
    // The template writes "s:x\nu:abc\na:", a token each letter.
    assert_eq!(said["usage"]["prompt_tokens"], 12);
    let mut streaming = chat.clone();
    streaming["stream"] = json!(true);
    let events = served.streamed("/v1/chat/completions", &streaming);
    let chunks: Vec<Value> = events.iter().filter_map(|e| serde_json::from_str(e).ok()).collect();
    assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
    let text: String = chunks.iter().filter_map(|c| c["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(json!(text), said["choices"][0]["message"]["content"]);
}

#[test]
fn choices_seeds_stops_and_paths() {
    let served = Served::start(|_, _| {});
    let asked = completion(json!({ "n": 3, "temperature": 1.0, "seed": 5, "prompt": ["ab", "cd"] }));
    let (status, first) = served.post("/v1/completions", &asked.to_string());
    let (_, second) = served.post("/v1/completions", &asked.to_string());
    assert_eq!(status, 200, "{first}");
    let texts = |body: &Value| -> Vec<String> {
        let choices = body["choices"].as_array().expect("choices");
        assert!(choices.iter().enumerate().all(|(i, c)| c["index"] == i));
        choices.iter().map(|c| c["text"].as_str().expect("text").to_owned()).collect()
    };
    assert_eq!(texts(&first).len(), 6);
    assert_eq!(texts(&first), texts(&second), "the seed decides");
    assert_ne!(texts(&first)[0], texts(&first)[1], "each choice has its own");
    assert_eq!(first["usage"]["prompt_tokens"], 4);

    let (_, whole) = served.post("/v1/completions", &completion(json!({})).to_string());
    let text = whole["choices"][0]["text"].as_str().expect("text").to_owned();
    let stop: String = text.chars().skip(4).take(2).collect();
    let before = &text[..text.find(&stop).expect("there")];
    let (_, stopped) = served.post("/v1/completions", &completion(json!({ "stop": [stop] })).to_string());
    assert_eq!(stopped["choices"][0]["text"], before);
    assert_eq!(stopped["choices"][0]["finish_reason"], "stop");

    let (_, with) =
        served.post("/v1/completions", &completion(json!({ "exflow": { "path": true } })).to_string());
    let tokens = with["choices"][0]["exflow"]["tokens"].as_array().expect("tokens");
    assert_eq!(tokens.len(), 12);
    assert!(tokens.iter().all(|t| t["path"].as_array().is_some_and(|hops| hops.len() == 2)), "{with}");
    served.until("it is counted", |live| live.requests.finished == 15);
    let (status, affinity) = served.get("/api/affinity?layer=0");
    assert_eq!((status, &affinity["tokens"]), (200, &json!(14.0)));
    assert_eq!(served.get("/api/affinity?layer=1").0, 400);
}

#[test]
fn log_probabilities_in_both_forms() {
    let served = Served::start(|_, _| {});
    let (status, whole) = served.post("/v1/completions", &completion(json!({ "logprobs": 2 })).to_string());
    assert_eq!(status, 200, "{whole}");
    let told = &whole["choices"][0]["logprobs"];
    for list in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(told[list].as_array().map(Vec::len), Some(12), "{list} in {told}");
    }
    let chat = json!({ "messages": [{ "role": "user", "content": "abc" }], "max_tokens": 5, "temperature": 0,
        "ignore_eos": true, "logprobs": true, "top_logprobs": 3, "stream": true });
    let events = served.streamed("/v1/chat/completions", &chat);
    let chunks = events.iter().filter_map(|e| serde_json::from_str::<Value>(e).ok());
    let tokens: Vec<Value> =
        chunks.filter_map(|c| c["choices"][0]["logprobs"]["content"].as_array().cloned()).flatten().collect();
    assert_eq!(tokens.len(), 5);
    for token in tokens {
        let top = token["top_logprobs"].as_array().expect("the likeliest");
        // Temperature 0 takes the likeliest, whose logarithm is at most 0.
        assert!(top.len() == 3 && top[0]["logprob"] == token["logprob"], "{token}");
        assert!(token["logprob"].as_f64().is_some_and(|x| x <= 0.0), "{token}");
    }
    let (status, answer) = served.post("/v1/completions", &completion(json!({ "logprobs": 99 })).to_string());
    assert_eq!(status, 400, "{answer}");
}

#[test]
fn errors_have_openais_form_and_status() {
    let served = Served::start(|_, engine| engine.max_waiting = 0);
    for (path, body, status, named) in [
        ("/v1/completions", "", 400, "empty"),
        ("/v1/completions", "{", 400, "body"),
        ("/v1/completions", "{\"prompt\": 5}", 400, "body"),
        ("/v1/completions", "{\"prompt\": \"a\", \"model\": \"gpt\"}", 404, "gpt"),
        ("/v1/completions", "{\"prompt\": \"a\", \"tools\": [1]}", 400, "tools"),
        ("/v1/completions", "{\"prompt\": [999]}", 400, "999"),
        ("/v1/completions", "{\"prompt\": \"a\", \"temperature\": -1}", 400, "temperature"),
        ("/v1/chat/completions", "{\"messages\": []}", 400, "messages"),
        ("/v1/completions", "{\"prompt\": \"a\"}", 503, "wait"),
        ("/v1/nothing", "{}", 404, "nothing"),
        ("/v1/models", "{}", 405, "method"),
    ] {
        let (got, answer) = served.post(path, body);
        let message = answer["error"]["message"].as_str().unwrap_or_default();
        assert!(got == status && message.contains(named), "{path} {body}: {got} {answer}");
        assert!(answer["error"]["type"].is_string() && answer["error"].get("code").is_some(), "{answer}");
    }
    let long = json!({ "prompt": "a".repeat(200) }).to_string();
    let (status, answer) = served.post("/v1/completions", &long);
    assert_eq!((status, &answer["error"]["code"]), (400, &json!("context_length_exceeded")));
    let huge = json!({ "prompt": "a".repeat(9 << 20) }).to_string();
    let refused = agent().post(served.url("/v1/completions")).send(huge.as_bytes());
    assert!(refused.map_or(true, |answer| answer.status().as_u16() == 413));
    let busy = agent().post(served.url("/v1/completions")).send("{\"prompt\": \"a\"}").expect("an answer");
    assert_eq!(busy.headers()["retry-after"], "1");
}

#[test]
fn keys_origins_models_health_and_metrics() {
    let served = Served::start(|options, _| {
        options.api_key = Some("secret".into());
        options.cors_origins = vec!["https://example.org".into()];
    });
    assert_eq!(served.get("/health").0, 200);
    assert_eq!(served.get("/").0, 200, "the page itself holds no secret");
    for path in ["/v1/models", "/metrics", "/api/model", "/api/live"] {
        let (status, answer) = served.get(path);
        assert_eq!((status, &answer["error"]["code"]), (401, &json!("invalid_api_key")), "{path}");
    }
    let with = |path: &str, key: &str| {
        let asked = agent().get(served.url(path)).header("Authorization", format!("Bearer {key}"));
        asked.header("Origin", "https://example.org").call().expect("an answer")
    };
    assert_eq!(with("/v1/models", "secreT").status().as_u16(), 401);
    let mut models = with("/v1/models", "secret");
    assert_eq!(models.headers()["access-control-allow-origin"], "https://example.org");
    let list: Value = serde_json::from_str(&models.body_mut().read_to_string().expect("text")).expect("JSON");
    assert_eq!((&list["object"], &list["data"][0]["id"]), (&json!("list"), &json!("tiny")));
    let metrics = with("/metrics", "secret").body_mut().read_to_string().expect("text");
    for name in [
        "exflow_output_tokens_total 0",
        "exflow_kv_blocks{rank=\"1\"}",
        "exflow_link_bytes_total{from=\"0\",to=\"1\"}",
    ] {
        assert!(metrics.contains(name), "{name} in\n{metrics}");
    }
    let (name, value) = ("exflow_http_requests_total{path=\"/v1/models\",status=\"401\"}", " 2");
    assert!(metrics.contains(&format!("{name}{value}")), "{metrics}");
}

#[test]
fn a_page_of_another_origin_gets_nothing_unless_asked() {
    let served = Served::start(|_, _| {});
    let answer = agent()
        .get(served.url("/v1/models"))
        .header("Origin", "https://example.org")
        .call()
        .expect("an answer");
    assert!(answer.headers().get("access-control-allow-origin").is_none());
    // The dashboard is whole and names no other address.
    let page = served.text("/");
    for part in page.split(['"', '\'']).filter(|part| part.starts_with("/page/")) {
        assert!(served.text(part).len() > 100, "{part}");
    }
    assert!(!page.contains("http://") && !page.contains("https://"), "{page}");
    let mut first = String::new();
    let live = agent().get(served.url("/api/live")).call().expect("an answer").into_body();
    BufReader::new(live.into_reader()).read_line(&mut first).expect("a line");
    let picture: Value = serde_json::from_str(first.trim_start_matches("data: ")).expect("JSON");
    assert_eq!(picture["ranks"].as_array().map(Vec::len), Some(2), "{picture}");
}

#[test]
fn a_client_that_goes_away_frees_its_sequence() {
    let served = Served::start(|_, _| {});
    for stream in [true, false] {
        let asked = completion(json!({ "stream": stream, "max_tokens": 120 })).to_string();
        let url = served.url("/v1/completions");
        let before = served.engine.live().requests;
        if stream {
            let answer = agent().post(&url).send(asked).expect("an answer");
            let mut lines = BufReader::new(answer.into_body().into_reader()).lines();
            assert!(lines.next().expect("a line").is_ok());
        } else {
            let short = ureq::Agent::config_builder().timeout_global(Some(Duration::from_millis(20))).build();
            let _ = ureq::Agent::from(short).post(&url).send(asked); // it gives up
        }
        served.until("it is gone", |live| {
            let over = live.requests.cancelled + live.requests.finished;
            live.running + live.waiting == 0 && over > before.cancelled + before.finished
        });
    }
    served.until("its cache too", |live| live.ranks.iter().all(|rank| rank.kv_blocks_used == 0));
    assert!(served.engine.live().requests.cancelled >= 1);
}

#[test]
fn a_shutdown_lets_what_runs_finish() {
    let mut served = Served::start(|_, _| {});
    let asked = completion(json!({ "stream": true, "max_tokens": 100 })).to_string();
    let answer = agent().post(served.url("/v1/completions")).send(asked).expect("an answer");
    let mut lines = BufReader::new(answer.into_body().into_reader()).lines();
    assert!(lines.next().expect("a line").is_ok());
    let _ = served.stop.take().expect("runs").send(());
    let rest: Vec<String> = lines.map(|line| line.expect("a line")).filter(|line| !line.is_empty()).collect();
    assert_eq!(rest.last().map(String::as_str), Some("data: [DONE]"));
    served.close();
    assert!(served.engine.ended().is_some());
}
