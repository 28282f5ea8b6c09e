//! Keys of config.json, each checked when it is read: an error names key, value and remedy.

use crate::EngineError;
use serde_json::{Map, Value};
use std::path::Path;

pub(super) struct Keys<'a> {
    pub(super) path: &'a Path,
    pub(super) map: &'a Map<String, Value>,
    /// The key that this object stands under, with a dot; empty at the top.
    pub(super) under: &'a str,
}

/// A key by one of the names that it has: the first is the one to report.
type Names<'n> = &'n [&'n str];

impl<'a> Keys<'a> {
    pub(super) fn bad(&self, key: &str, what: impl Into<String>, remedy: impl Into<String>) -> EngineError {
        EngineError::config(self.path, &format!("{}{key}", self.under), what, remedy)
    }

    /// The value that is there and not null.
    pub(super) fn get(&self, names: Names) -> Option<&'a Value> {
        names.iter().find_map(|name| self.map.get(*name)).filter(|value| !value.is_null())
    }

    pub(super) fn object(&self, name: &'a str) -> Result<Option<&'a Map<String, Value>>, EngineError> {
        match self.get(&[name]) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(map)),
            Some(_) => Err(self.bad(name, "not an object", "write it as the model's publisher does")),
        }
    }

    pub(super) fn text(&self, name: &str) -> Option<&'a str> {
        self.get(&[name]).and_then(Value::as_str)
    }

    pub(super) fn count(&self, names: Names, most: usize) -> Result<usize, EngineError> {
        self.count_if_there(names, most)?
            .ok_or_else(|| self.bad(names[0], "missing", "add it, a whole number above 0"))
    }

    pub(super) fn count_or(&self, names: Names, most: usize, default: usize) -> Result<usize, EngineError> {
        Ok(self.count_if_there(names, most)?.unwrap_or(default))
    }

    pub(super) fn count_if_there(&self, names: Names, most: usize) -> Result<Option<usize>, EngineError> {
        let Some(value) = self.get(names) else { return Ok(None) };
        match value.as_u64().and_then(|n| usize::try_from(n).ok()) {
            Some(n) if n > 0 && n <= most => Ok(Some(n)),
            _ => {
                let what = format!("{value} is out of range");
                Err(self.bad(names[0], what, format!("set it from 1 to {most}")))
            }
        }
    }

    /// A whole number from 0 on.
    pub(super) fn whole(&self, name: &str, most: usize, default: usize) -> Result<usize, EngineError> {
        match self.get(&[name]) {
            Some(value) if value.as_u64() == Some(0) => Ok(0),
            _ => self.count_or(&[name], most, default),
        }
    }

    /// A number within `least..=most`.
    pub(super) fn number(&self, names: Names, least: f64, most: f64) -> Result<Option<f64>, EngineError> {
        let Some(value) = self.get(names) else { return Ok(None) };
        match value.as_f64() {
            Some(x) if x.is_finite() && x >= least && x <= most => Ok(Some(x)),
            _ => {
                let what = format!("{value} is out of range");
                Err(self.bad(names[0], what, format!("set it from {least} to {most}")))
            }
        }
    }

    pub(super) fn number_needed(&self, name: &str, least: f64, most: f64) -> Result<f64, EngineError> {
        let remedy = format!("add it, a number from {least} to {most}");
        self.number(&[name], least, most)?.ok_or_else(|| self.bad(name, "missing", remedy))
    }

    /// An epsilon.
    pub(super) fn eps(&self, name: &str, default: Option<f64>) -> Result<f32, EngineError> {
        let missing = || self.bad(name, "missing", "add it, 1e-5 as a rule");
        let value = self.number(&[name], f64::MIN_POSITIVE, 1.0)?.or(default).ok_or_else(missing)?;
        Ok(value as f32)
    }

    pub(super) fn flag(&self, name: &str) -> Result<Option<bool>, EngineError> {
        match self.get(&[name]) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(other) => {
                Err(self.bad(name, format!("{other} is no truth value"), "use true, false or null"))
            }
        }
    }

    /// `count` numbers.
    pub(super) fn numbers(&self, name: &str, count: usize) -> Result<Vec<f64>, EngineError> {
        let wrong = |what: String| self.bad(name, what, format!("give a list of {count} numbers above 0"));
        let Some(value) = self.get(&[name]) else { return Err(wrong("missing".into())) };
        let list = value.as_array().ok_or_else(|| wrong("not a list".into()))?;
        let numbers: Option<Vec<f64>> =
            list.iter().map(|v| v.as_f64().filter(|x| x.is_finite() && *x > 0.0)).collect();
        match numbers {
            Some(numbers) if numbers.len() == count => Ok(numbers),
            Some(numbers) => Err(wrong(format!("{} numbers", numbers.len()))),
            None => Err(wrong("an element is no number above 0".into())),
        }
    }

    /// A token id, a list of them, or none.
    pub(super) fn ids(&self, key: &str, vocab: usize) -> Result<Vec<u32>, EngineError> {
        let one = |value: &Value| {
            let id = value.as_u64().filter(|&id| id < vocab as u64);
            id.map(|id| id as u32).ok_or_else(|| {
                self.bad(key, format!("{value} is no token id"), format!("use ids below {vocab}, or null"))
            })
        };
        match self.get(&[key]) {
            None => Ok(Vec::new()),
            Some(Value::Array(list)) => list.iter().map(one).collect(),
            Some(value) => Ok(vec![one(value)?]),
        }
    }
}
