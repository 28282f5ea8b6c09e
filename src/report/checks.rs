//! Claims of the paper beside our figures: a table with pass or fail, and a drawing where a figure has a course.

use super::data::CheckFacts;
use super::svg::{Svg, escape};
use std::fmt::Write;

const WIDTH: f64 = 520.0;
const HEIGHT: f64 = 170.0;
const LEFT: f64 = 44.0;
const BOTTOM: f64 = 34.0;

/// The whole section's content.
pub(super) fn figures(checks: &[CheckFacts]) -> String {
    let mut html = String::from(
        "<div class=\"scroll\"><table class=\"checks\"><thead><tr><th></th><th>claim</th><th>here</th><th></th></tr></thead><tbody>",
    );
    for check in checks {
        let (class, word) = match check.pass {
            Some(true) => ("check yes", "pass"),
            Some(false) => ("check no", "fail"),
            None => ("m", "not measured"),
        };
        let _ = write!(
            html,
            "<tr><th scope=\"row\">{}</th><td class=\"text\">{}</td><td class=\"text\">{}{}</td><td class=\"{class}\">{word}</td></tr>",
            escape(&check.name),
            escape(&check.claim),
            escape(&check.figure),
            course(check)
        );
    }
    html.push_str("</tbody></table></div>");
    html
}

/// Values over their names, where there are enough to see a course.
fn course(check: &CheckFacts) -> String {
    let finite = check.values.iter().all(|(_, value)| value.is_finite());
    if check.values.len() < 3 || !finite {
        return String::new();
    }
    let values = check.values.iter().map(|(_, value)| *value);
    let (low, high) = values.fold((0.0f64, f64::MIN_POSITIVE), |(low, high), v| (low.min(v), high.max(v)));
    let x = |at: usize| LEFT + 8.0 + (WIDTH - LEFT - 24.0) * at as f64 / (check.values.len() - 1) as f64;
    let y = |value: f64| 10.0 + (HEIGHT - 10.0 - BOTTOM) * (high - value) / (high - low);
    let mut svg = Svg::new(WIDTH, HEIGHT);
    for at in [low, f64::midpoint(low, high), high] {
        svg.path(&format!("M{LEFT} {:.1}H{WIDTH}", y(at)), "stroke:var(--line);stroke-width:1");
        svg.text(LEFT - 4.0, y(at) + 4.0, "m", "end", &format!("{at:.2}"));
    }
    let mut line = String::new();
    let every = check.values.len().div_ceil(7);
    for (at, (name, value)) in check.values.iter().enumerate() {
        let _ = write!(line, "{}{:.1} {:.1}", if at == 0 { 'M' } else { 'L' }, x(at), y(*value));
        svg.rect_titled(
            [x(at) - 3.0, y(*value) - 3.0, 6.0, 6.0],
            "var(--accent)",
            &format!("{name}: {value:.4}"),
        );
        if at % every == 0 {
            svg.text(x(at), HEIGHT - BOTTOM + 18.0, "m", "middle", name);
        }
    }
    svg.path(&line, "stroke:var(--accent);stroke-width:2;fill:none");
    svg.finish(&format!("{}: {}", check.name, check.claim), "class=\"wide\"")
}
