//! Where a rank's news go: to the driver, where it is in this process, else with the next gathering to rank 0.

use super::measure::Measured;
use super::stats::RankStats;
use super::worker::{Captured, Event};
use exflow_placement::Rank;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::sync::mpsc::Sender;

/// News that cross processes, for the driver.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum News {
    Captured(Captured),
    Report(Box<RankStats>),
    Measured(Box<Measured>),
}

/// Where news go.
pub(crate) enum Outlet {
    /// The driver is here.
    Driver(Sender<Event>),
    /// Kept until the next gathering.
    Away(VecDeque<News>),
}

/// Bytes of news in one gathering, roughly: well under what a frame holds.
const GATHERED_BYTES: usize = 16 << 20;

impl Outlet {
    pub(crate) fn away() -> Self {
        Self::Away(VecDeque::new())
    }

    pub(crate) fn tell(&mut self, event: Event) {
        match self {
            // A driver that went away is noticed by rank 0, which stops the world.
            Self::Driver(events) => drop(events.send(event)),
            Self::Away(news) => match event {
                Event::Captured(captured) => news.push_back(News::Captured(captured)),
                Event::Report(_, stats) => news.push_back(News::Report(stats)),
                Event::Measured(_, measured) => news.push_back(News::Measured(measured)),
                _ => {}
            },
        }
    }

    /// The news for the next gathering, and whether more remain.
    pub(crate) fn take(&mut self) -> (Vec<News>, bool) {
        let Self::Away(news) = self else { return (Vec::new(), false) };
        let (mut taken, mut bytes) = (Vec::new(), 0);
        while let Some(next) = news.front() {
            bytes += next.bytes();
            if !taken.is_empty() && bytes > GATHERED_BYTES {
                break;
            }
            taken.extend(news.pop_front());
        }
        (taken, !news.is_empty())
    }
}

impl News {
    fn bytes(&self) -> usize {
        match self {
            Self::Captured(Captured::Logits { values, .. }) => 4 * values.len(),
            Self::Captured(Captured::Route { experts, .. }) => 8 * experts.len(),
            Self::Report(_) => 1024,
            Self::Measured(measured) => 4096 + 24 * measured.links.len(),
        }
    }

    pub(crate) fn event(self, from: Rank) -> Event {
        match self {
            Self::Captured(captured) => Event::Captured(captured),
            Self::Report(stats) => Event::Report(from, stats),
            Self::Measured(measured) => Event::Measured(from, measured),
        }
    }
}
