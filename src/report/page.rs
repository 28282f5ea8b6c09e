//! The page: sections in order, what to see in each, and the numbers as JSON at the end.

use super::data::{ReportData, SettingFacts};
use super::svg::{escape, script_safe};
use super::table::rate_text;
use super::{affinity, bars, checks, colour, course, placement, replay, strategies, table, traffic};

const STYLE: &str = include_str!("style.css");
const HOVER: &str = include_str!("hover.js");

/// The whole report as one HTML document.
pub fn render(data: &ReportData) -> String {
    let json = serde_json::to_string(data).unwrap_or_else(|_| "{}".into());
    let has =
        |some: bool, section: fn(&ReportData) -> String| if some { section(data) } else { String::new() };
    let ran = !data.settings.is_empty();
    let body: String = [
        header(data),
        has(!data.checks.is_empty(), check_section),
        has(ran, settings),
        has(!data.stay.is_empty(), stay),
        has(ran, bytes),
        has(ran, traffic_section),
        has(!data.strategies.is_empty(), strategy_section),
        has(!data.placement.assignment.is_empty(), grid),
        has(!data.others.is_empty(), other_grids),
        has(!data.transitions.is_empty(), maps),
        replay::sections_of(&data.replays),
        texts(data),
        has(ran || !data.model.digest.is_empty(), facts),
    ]
    .concat();
    document(&data.title, &body, &json)
}

/// A document around `body`, with `json` as its data.
pub(super) fn document(title: &str, body: &str, json: &str) -> String {
    let style = STYLE
        .replace("/*SCALE-LIGHT*/", &colour::variables(false))
        .replace("/*SCALE-DARK*/", &colour::variables(true));
    let title = escape(title);
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\
         <title>{title}</title><style>{style}</style></head>\n<body><main>{body}</main>\
         <div class=\"tip\" role=\"status\"></div>\n\
         <script type=\"application/json\" id=\"data\">{}</script>\n<script>{HOVER}</script></body></html>\n",
        script_safe(json)
    )
}

fn header(data: &ReportData) -> String {
    if data.settings.is_empty() {
        return format!(
            "<header><p class=\"eyebrow\">exflow {} · {}</p><h1>{}</h1><p>{}</p></header>",
            escape(&data.version),
            escape(&data.created),
            escape(&data.title),
            escape(&data.profile.sources.join(" · "))
        );
    }
    let tiles: String = tiles(data).iter().map(|(value, text)| tile(value, text)).collect();
    let (class, verdict) = if data.same_tokens {
        ("yes", "Every setting and repeat produced the same tokens.")
    } else {
        ("no", "The settings did NOT produce the same tokens: do not trust this run.")
    };
    format!(
        "<header><p class=\"eyebrow\">exflow {} · {}</p><h1>{}</h1>\
         <p>{} on {} ranks joined by {}: {} MoE layers of {} experts, top-{}. \
         <span class=\"check {class}\">{verdict}</span></p><div class=\"tiles\">{tiles}</div></header>",
        escape(&data.version),
        escape(&data.created),
        escape(&data.title),
        escape(&data.model.name),
        data.placement.ranks,
        escape(&data.transport),
        data.model.moe_layers,
        data.model.experts,
        data.model.top_k,
    )
}

/// The four numbers to take home: last setting against first, affinity against round-robin.
fn tiles(data: &ReportData) -> Vec<(String, String)> {
    let mut tiles = Vec::new();
    if let (Some(first), Some(last)) = (data.settings.first(), data.settings.last()) {
        tiles.push((
            format!("{:.2} → {:.2}", first.exchanges_per_layer, last.exchanges_per_layer),
            format!("exchanges per MoE layer and step, {} → {}", first.strategy, last.strategy),
        ));
        tiles.push((
            format!("{:.1}", last.tokens_per_s),
            format!("tokens/s with {}{}", last.label(), ratio(first, last)),
        ));
    }
    if let (Some(first), Some(last)) = (data.stay.first(), data.stay.last()) {
        tiles.push((
            format!("{:.0} → {:.0} %", 100.0 * first.stay_rate, 100.0 * last.stay_rate),
            format!("stay rate on held-out text, {} → {}", first.label, last.label),
        ));
        tiles.push((
            format!("{:.2} → {:.2}", first.crossings_per_token, last.crossings_per_token),
            "crossings per token on held-out text".into(),
        ));
    }
    tiles
}

fn ratio(first: &SettingFacts, last: &SettingFacts) -> String {
    if first.tokens_per_s > 0.0 {
        format!(", {:.2} × {}", last.tokens_per_s / first.tokens_per_s, first.label())
    } else {
        String::new()
    }
}

fn tile(value: &str, text: &str) -> String {
    format!("<div class=\"tile\"><b>{}</b><span>{}</span></div>", escape(value), escape(text))
}

fn section(title: &str, lead: &str, content: &str) -> String {
    format!("<section><h2>{title}</h2><p>{lead}</p>{content}</section>")
}

fn settings(data: &ReportData) -> String {
    let lead = format!(
        "Medians of {} interleaved runs of {} sequences at once. Every byte on the wire is in one of the five classes.",
        data.repeats, data.sequences
    );
    section("The settings, side by side", &lead, &table::figures(data))
}

fn stay(data: &ReportData) -> String {
    let busiest: Vec<String> =
        data.stay.iter().map(|s| format!("{} {:.2}", escape(&s.label), s.imbalance)).collect();
    let tokens = match data.profile.held_out_tokens {
        0 => format!("{} tokens, which may be those that were solved on", data.profile.tokens),
        unseen => format!("{unseen} tokens of text that was not profiled"),
    };
    let lead = format!(
        "Share of layer transitions that need no crossing, on {tokens}. \
         A placement can look local by piling work on one rank, so read it beside its balance: \
         busiest rank over the mean, worst layer: {}.",
        busiest.join(" · ")
    );
    section("How often a token may stay where it is", &lead, &bars::stay_rates(data))
}

fn bytes(data: &ReportData) -> String {
    let lead = "Coherence removes the combine and pays with keys and values, which travel in the background. \
                It saves exchanges always; bytes only where K/V is small beside the hidden state.";
    section("Bytes per decoded token", lead, &bars::bytes(data))
}

fn traffic_section(data: &ReportData) -> String {
    let lead =
        "Bytes sent from one rank (row) to another (column), headers included, all on one colour scale.";
    section("Who talks to whom", lead, &traffic::figures(data))
}

fn grid(data: &ReportData) -> String {
    let placement = &data.placement;
    let bound = match placement.lower_bound {
        Some(bound) if bound > 0.0 && placement.crossings_per_token > 0.0 => format!(
            " No placement within the same bounds can cross less than {bound:.3}: the gap is at most {:.1} %.",
            100.0 * (1.0 - bound / placement.crossings_per_token.max(bound))
        ),
        _ => String::new(),
    };
    let found = if placement.seconds > 0.0 {
        format!(", found in {:.1} s", placement.seconds)
    } else {
        String::new()
    };
    let crossings = if placement.crossings_per_token > 0.0 {
        format!(" {:.3} crossings a token on the profile{found}.", placement.crossings_per_token)
    } else {
        String::new()
    };
    let lead = format!("Rank of every expert: rows are MoE layers, columns experts.{crossings}{bound}");
    let grid = placement::grid(placement, &data.load);
    section("The placement", &lead, &grid) + &course_section(placement)
}

fn course_section(placement: &super::PlacementFacts) -> String {
    let drawing = course::figure(placement);
    if drawing.is_empty() {
        return String::new();
    }
    let cost = placement.history.last().map_or(0.0, |last| last.cost);
    let beside: Vec<String> = placement
        .baselines
        .iter()
        .filter(|_| cost > 0.0)
        .map(|(name, other)| format!("{} {:.2}", name.replace('_', "-"), other / cost))
        .collect();
    let beside = match beside.is_empty() {
        true => String::new(),
        false => format!(" Cost of other placements over this one's: {}.", escape(&beside.join(" · "))),
    };
    let lead = format!(
        "Cost of the best placement so far, and below it what is proven: no placement costs less than the lower line.{beside}"
    );
    section("How the placement was found", &lead, &drawing)
}

fn other_grids(data: &ReportData) -> String {
    let one = |placement: &super::PlacementFacts| {
        let crossings = match placement.crossings_per_token {
            c if c > 0.0 => format!("{c:.3} crossings a token on the profile."),
            _ => String::new(),
        };
        let title = escape(&placement.name);
        section(&title, &crossings, &placement::grid(placement, &data.load)) + &course_section(placement)
    };
    data.others.iter().map(one).collect()
}

fn check_section(data: &ReportData) -> String {
    let passed = data.checks.iter().filter(|check| check.pass == Some(true)).count();
    let failed = data.checks.iter().filter(|check| check.pass == Some(false)).count();
    let open = data.checks.len() - passed - failed;
    let lead = format!(
        "What \"Exploiting Inter-Layer Expert Affinity\" claims or rests on, measured here: {passed} hold, {failed} do not, {open} were not measured."
    );
    section("Checks from the paper", &lead, &checks::figures(&data.checks))
}

fn strategy_section(data: &ReportData) -> String {
    let lead = "Measured output tokens a second while decoding; the upright marks are what the planner said before the run.";
    section("Strategies, schedules and tables", lead, &strategies::figures(&data.strategies))
}

fn maps(data: &ReportData) -> String {
    let lead = "Where the tokens of one expert go next. Grouped by rank, each outlined block is what stays on a rank: \
                a good placement gathers the strong cells inside the blocks.";
    let controls = "<input class=\"pick\" type=\"radio\" name=\"order\" id=\"rank\" checked>\
                    <input class=\"pick\" type=\"radio\" name=\"order\" id=\"router\">\
                    <div class=\"order\"><label for=\"rank\">grouped by rank</label>\
                    <label for=\"router\">router order</label></div>";
    section("Affinity between layers", lead, &format!("{controls}{}", affinity::figures(data)))
}

fn texts(data: &ReportData) -> String {
    if data.texts.is_empty() {
        return String::new();
    }
    let quotes: String = data
        .texts
        .iter()
        .map(|(prompt, text)| format!("<blockquote><b>{}</b>{}</blockquote>", escape(prompt), escape(text)))
        .collect();
    format!("<details><summary>The text that every setting produced</summary>{quotes}</details>")
}

fn facts(data: &ReportData) -> String {
    let model = &data.model;
    let mut adapters: Vec<&str> = data.adapters.iter().map(String::as_str).collect();
    adapters.dedup();
    let rows = [
        (
            "model",
            format!(
                "{}: {} layers, hidden size {}, vocabulary {}, context {}",
                model.name, model.layers, model.hidden, model.vocab, model.positions
            ),
        ),
        ("digest", model.digest.clone()),
        ("adapters", adapters.join("; ")),
        (
            "profile",
            format!(
                "{} tokens in {:.1} s, from {}",
                data.profile.tokens,
                data.profile.seconds,
                data.profile.sources.join(", ")
            ),
        ),
        ("same tokens", if data.same_tokens { "yes".into() } else { "NO".to_owned() }),
        (
            "stay rates",
            data.stay
                .iter()
                .map(|s| format!("{} {}", s.label, rate_text(s.stay_rate)))
                .collect::<Vec<_>>()
                .join(", "),
        ),
    ];
    let list: String =
        rows.iter().map(|(name, value)| format!("<dt>{name}</dt><dd>{}</dd>", escape(value))).collect();
    format!(
        "<section><h2>How it was measured</h2><dl>{list}</dl>\
         <p class=\"note\">Every figure is defined in docs/METHODOLOGY.md. All numbers of this page are in it as JSON: \
         <code>document.getElementById(\"data\")</code>.</p></section>"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{PlacementFacts, StayFacts};

    fn small() -> ReportData {
        ReportData {
            title: "a <b> & c".into(),
            placement: PlacementFacts {
                ranks: 2,
                assignment: vec![vec![0, 1], vec![1, 0]],
                ..Default::default()
            },
            transitions: vec![vec![vec![9.0, 1.0], vec![2.0, 8.0]]],
            load: vec![vec![10.0, 10.0]; 2],
            stay: vec![StayFacts { label: "round-robin".into(), stay_rate: 0.5, ..Default::default() }],
            settings: vec![SettingFacts {
                strategy: "coherent".into(),
                placement: "round_robin".into(),
                traffic: vec![vec![0, 70], vec![1234, 0]],
                ..Default::default()
            }],
            texts: vec![("</script>".into(), "x".into())],
            ..Default::default()
        }
    }

    #[test]
    fn the_page_stands_alone_and_escapes_what_it_shows() {
        let page = render(&small());
        assert!(!page.contains("http"), "no outside address");
        assert!(page.contains("a &lt;b&gt; &amp; c"));
        assert_eq!(page.matches("</script>").count(), 2, "only the two that the page itself closes");
        assert!(!page.contains("NaN") && !page.contains("inf\""));
    }

    #[test]
    fn there_is_a_map_per_layer_pair_in_both_orders() {
        let page = render(&small());
        assert_eq!(page.matches("data-pair=\"0\"").count(), 2);
        assert!(page.contains("1.23 kB"));
    }

    #[test]
    fn an_empty_report_is_still_a_page() {
        assert!(render(&ReportData::default()).contains("</html>"));
    }

    #[test]
    fn the_numbers_can_be_read_back() {
        let page = render(&small());
        let start = page.find("id=\"data\">").expect("data element") + 10;
        let json = &page[start..start + page[start..].find("</script>").expect("its end")];
        let value: serde_json::Value = serde_json::from_str(json).expect("JSON");
        assert_eq!(value["transitions"][0][1][1], 8.0);
    }
}
