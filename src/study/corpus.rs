//! Text to profile on: documents and what the model itself writes, in passages, some kept back.

use super::StudyError;
use exflow_engine::{Cluster, ModelSpec, Progress, Request, Sampling};
use exflow_placement::Rng;

/// Every so many passages one is kept back: never profiled, only scored.
const HOLD_OUT_EVERY: usize = 4;
/// Shorter passages say little about routing.
const SHORTEST: usize = 8;
/// Fewer passages than this cannot be split into profile and held-out text.
const LEAST_PASSAGES: usize = HOLD_OUT_EVERY;

/// Of own text: as people commonly let models write. The likeliest tokens alone soon go round in circles, and equal
/// beginnings would give equal text.
const TEMPERATURE: f32 = 0.7;

/// What the writing of own text is called while it runs.
const STAGE: &str = "write text to profile";

/// A text with a name for the report.
#[derive(Debug, Clone)]
pub struct Document {
    /// Name, for people.
    pub name: String,
    /// The text.
    pub text: String,
}

/// How much text the model writes itself, and from what.
#[derive(Debug, Clone)]
pub struct OwnText {
    /// Beginnings, taken in turn.
    pub beginnings: Vec<String>,
    /// Sequences in all; they run together. 0: none.
    pub sequences: usize,
    /// Most tokens of each.
    pub tokens: usize,
    /// Seed of the tokens that are drawn.
    pub seed: u64,
}

/// Passages of token ids, split into those that are profiled and those that are kept back.
#[derive(Debug, Clone, Default)]
pub struct Corpus {
    /// To profile and solve on.
    pub profile: Vec<Vec<u32>>,
    /// To score on: every fourth passage.
    pub held_out: Vec<Vec<u32>>,
    /// Where the text came from.
    pub sources: Vec<String>,
}

impl Corpus {
    /// Encodes `documents`, lets the model write `own`, and cuts both into passages of at most `passage` tokens.
    pub fn collect(
        cluster: &mut Cluster,
        documents: &[Document],
        own: &OwnText,
        passage: usize,
        progress: &dyn Progress,
    ) -> Result<Self, StudyError> {
        let mut corpus = Self::default();
        let written = write_own(cluster, own, progress)?;
        if !written.is_empty() {
            corpus.sources.push("text that the model wrote".into());
            corpus.add(written.iter().flat_map(|ids| passages(ids, passage, cluster.spec())));
        }
        for document in documents {
            let ids = cluster.text()?.encode(&document.text)?;
            corpus.sources.push(document.name.clone());
            corpus.add(passages(&ids, passage, cluster.spec()).into_iter());
        }
        let count = corpus.profile.len() + corpus.held_out.len();
        if count < LEAST_PASSAGES {
            return Err(StudyError::LittleText { passages: count, least: LEAST_PASSAGES });
        }
        Ok(corpus)
    }

    fn add(&mut self, passages: impl Iterator<Item = Vec<u32>>) {
        for passage in passages {
            let number = self.profile.len() + self.held_out.len();
            let side = if number % HOLD_OUT_EVERY == HOLD_OUT_EVERY - 1 {
                &mut self.held_out
            } else {
                &mut self.profile
            };
            side.push(passage);
        }
    }
}

/// Cuts ids into passages of at most `longest` tokens and of at most the model's context.
pub fn passages(ids: &[u32], longest: usize, spec: &ModelSpec) -> Vec<Vec<u32>> {
    let longest = longest.min(spec.max_positions).max(1);
    let shortest = SHORTEST.min(longest);
    ids.chunks(longest)
        .filter(|chunk| chunk.len() >= shortest || ids.len() < shortest)
        .map(<[u32]>::to_vec)
        .collect()
}

/// Text that the model writes on from the beginnings, taken in turn.
fn write_own(
    cluster: &mut Cluster,
    own: &OwnText,
    progress: &dyn Progress,
) -> Result<Vec<Vec<u32>>, StudyError> {
    if own.sequences == 0 || own.beginnings.is_empty() {
        return Ok(Vec::new());
    }
    let codec = cluster.text()?;
    let beginnings = own.beginnings.iter().map(|text| codec.encode(text)).collect::<Result<Vec<_>, _>>()?;
    let (mut dice, longest) = (Rng::new(own.seed), cluster.spec().max_positions);
    let mut request = |prompt_ids: &Vec<u32>| Request {
        prompt_ids: prompt_ids.clone(),
        max_tokens: own.tokens.min(longest.saturating_sub(prompt_ids.len())).max(1),
        ignore_eos: true,
        sampling: Sampling { temperature: TEMPERATURE, seed: dice.next_u64(), ..Sampling::default() },
        ..Request::default()
    };
    let requests: Vec<Request> = beginnings.iter().cycle().take(own.sequences).map(&mut request).collect();
    let (mut done, total) = (0, requests.iter().map(|request| request.max_tokens as u64).sum());
    let run = cluster.generate(&requests, &mut |_| {
        done += 1;
        progress.update(STAGE, done, total, "tokens");
    })?;
    Ok(run.sequences.into_iter().map(|done| [done.prompt_ids, done.output_ids].concat()).collect())
}
