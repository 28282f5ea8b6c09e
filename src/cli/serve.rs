//! `exflow serve`: the OpenAI-compatible server with its dashboard.

use super::failure::Failure;
use super::flags::{self, RankFlags};
use super::{os, output};
use exflow::engine::{Cluster, Engine, EngineOptions};
use exflow::progress::Bars;
use exflow::serve::{ServeError, ServeOptions, Server};
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Serves a model as OpenAI's API, with a dashboard
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  exflow serve -m examples/models/gpt-moe-16e --ep-size 4 --port 8080\n  \
                  curl http://127.0.0.1:8080/v1/completions -d '{\"prompt\": \"In the beginning\", \"max_tokens\": 20}'\n\n\
                  Ctrl-C or SIGTERM takes no more requests and lets those that run finish; a second one ends at once.")]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) ranks: RankFlags,
    /// Address to listen on; 0.0.0.0 or :: for every interface
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    host: IpAddr,
    /// Port to listen on; 0 takes a free one
    #[arg(long, value_name = "PORT", default_value_t = 8080)]
    port: u16,
    /// Key that clients must send as bearer token
    #[arg(long, value_name = "KEY", env = "EXFLOW_API_KEY", hide_env_values = true, value_parser = key)]
    api_key: Option<String>,
    /// Web pages of this origin may use the server from a browser; * for any
    #[arg(long, value_name = "ORIGIN", num_args = 1..)]
    cors_origin: Vec<String>,
    /// The model's name in requests and answers [default: the folder's name]
    #[arg(long, value_name = "NAME")]
    served_model_name: Option<String>,
    /// Chat template (Jinja) in place of the model's own
    #[arg(long, value_name = "FILE")]
    chat_template: Option<PathBuf>,
    /// Most requests that may wait for their first token; further ones get 503
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_waiting: usize,
    /// How long requests that run may go on after Ctrl-C
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = flags::duration)]
    grace: Duration,
    /// Counts for the dashboard's affinity map the routes of every request, not only of those that ask for their path
    #[arg(long)]
    count_routes: bool,
    /// Experts move to other ranks while requests run, where the text of late calls for it and it pays by what a crossing
    /// takes; looked at every so many tokens, as many as make a profile (100 for each expert with top-1) if none are given
    #[arg(long, value_name = "TOKENS", num_args = 0..=1, default_missing_value = "auto", value_parser = tokens)]
    replace_live: Option<Every>,
}

/// Tokens after which something is looked at, where they are told.
#[derive(Debug, Clone, Copy)]
struct Every(Option<usize>);

fn tokens(text: &str) -> Result<Every, String> {
    match (text, text.parse()) {
        ("auto", _) => Ok(Every(None)),
        (_, Ok(tokens @ 1..)) => Ok(Every(Some(tokens))),
        _ => Err("give a number of tokens from 1 up, or none".into()),
    }
}

fn key(text: &str) -> Result<String, String> {
    if text.trim().is_empty() {
        Err("an empty key lets nobody in; leave it out".into())
    } else {
        Ok(text.into())
    }
}

/// Requests at once that it is planned for.
const SERVED: usize = 8;

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let engine_options = EngineOptions {
        max_waiting: args.max_waiting,
        count_routes: args.count_routes,
        replace_live: args.replace_live.is_some(),
        replace_every: args.replace_live.and_then(|every| every.0),
    };
    let Some(mut options) = args.ranks.led(&Bars::new())? else { return Ok(()) };
    options.room_for_moves = engine_options.replace_live;
    let mut cluster = Cluster::start(options, &Bars::new())?;
    let chosen = args.ranks.tune(&mut cluster, SERVED)?;
    let engine = Engine::over(cluster, engine_options)?;
    args.ranks.note_placement();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|e| Failure::Run(format!("no threads for the server: {e}")))?;
    runtime.block_on(serve(engine, args, chosen.map(|chosen| chosen.prediction.ms_per_token)))
}

async fn serve(engine: Engine, args: &Args, predicted: Option<f64>) -> Result<(), Failure> {
    let options = ServeOptions {
        address: SocketAddr::new(args.host, args.port),
        api_key: args.api_key.clone(),
        cors_origins: args.cors_origin.clone(),
        chat_template: args.chat_template.clone(),
        grace: args.grace,
        predicted_ms_per_token: predicted,
        ..ServeOptions::new(name(args))
    };
    if args.api_key.is_none() && !args.host.is_loopback() {
        output::note("warning: everybody who reaches this address may use it; --api-key KEY asks for a key");
    }
    let server = Server::bind(engine, options).await?;
    output::note(&format!("listening on http://{} (dashboard there; API at /v1)", server.address()));
    server.run(asked_to_stop()).await?;
    output::note("done");
    Ok(())
}

/// What clients call the model: as told, else its name on the Hub, else the folder's name.
fn name(args: &Args) -> String {
    args.served_model_name.clone().unwrap_or_else(|| name_of(&args.ranks.model))
}

fn name_of(model: &Path) -> String {
    let path = std::path::absolute(model).unwrap_or_else(|_| model.to_owned());
    let parts = || path.iter().filter_map(|part| part.to_str());
    // The Hub's cache: models--ORG--NAME/snapshots/REVISION.
    let on_the_hub = parts().find_map(|part| part.strip_prefix("models--"));
    match on_the_hub {
        Some(name) => name.replacen("--", "/", 1),
        None => parts().next_back().unwrap_or("model").to_owned(),
    }
}

/// Comes back at the first Ctrl-C or SIGTERM; the second one ends the process.
async fn asked_to_stop() {
    os::asked_to_end().await;
    output::note("finishing the requests that run; once more to end at once");
    tokio::spawn(async {
        os::asked_to_end().await;
        std::process::exit(1);
    });
}

impl From<ServeError> for Failure {
    fn from(error: ServeError) -> Self {
        match error {
            ServeError::Template(error) => error.into(),
            ServeError::Origin(_) => Self::Input(error.to_string()),
            _ => Self::Run(error.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_are_called_as_people_know_them() {
        assert_eq!(name_of(Path::new("/models/olmoe/")), "olmoe");
        assert_eq!(name_of(Path::new("/cache/models--allenai--OLMoE-1B/snapshots/0abc")), "allenai/OLMoE-1B");
    }
}
