//! Cost of the best placement and its proven bound against the solver's time, as steps on a logarithmic time axis.

use super::data::PlacementFacts;
use super::svg::Svg;
use super::table::rate_text;
use exflow_placement::Moment;

const WIDTH: f64 = 520.0;
const HEIGHT: f64 = 250.0;
const LEFT: f64 = 78.0;
const RIGHT: f64 = 10.0;
const TOP: f64 = 14.0;
const BOTTOM: f64 = 38.0;
/// Times below this are drawn at it.
const SHORTEST: f64 = 1e-3;

/// The drawing; empty where the table carries no history.
pub(super) fn figure(placement: &PlacementFacts) -> String {
    let Some(frame) = Frame::of(placement) else { return String::new() };
    let mut svg = Svg::new(WIDTH, HEIGHT);
    frame.axes(&mut svg);
    let line = |value: fn(&Moment) -> f64| frame.steps(&placement.history, value);
    let (cost, bound) = (line(|m| m.cost), line(|m| m.lower_bound));
    let back = frame.back(&placement.history);
    svg.path(&format!("{cost}{back}z"), "fill:var(--well);stroke:none");
    svg.path(&cost, "stroke:var(--accent);stroke-width:2;fill:none");
    svg.path(&bound, "stroke:var(--quiet);stroke-width:2;fill:none");
    if let Some(last) = placement.history.last() {
        let x = WIDTH - RIGHT;
        svg.text(x, frame.y(last.cost) - 6.0, "t", "end", &format!("cost {}", short(last.cost)));
        let gap = if last.cost > 0.0 { 1.0 - last.lower_bound / last.cost } else { 0.0 };
        let proven = format!("proven bound {}, gap {}", short(last.lower_bound), rate_text(gap));
        svg.text(x, frame.y(last.lower_bound) + 15.0, "m", "end", &proven);
    }
    svg.finish("cost of the best placement and its proven bound against time", "class=\"wide\"")
}

/// Ranges of both axes.
struct Frame {
    times: [f64; 2],
    costs: [f64; 2],
}

impl Frame {
    fn of(placement: &PlacementFacts) -> Option<Self> {
        let (first, last) = (placement.history.first()?, placement.history.last()?);
        let begin = first.seconds.max(SHORTEST);
        let end = last.seconds.max(begin * 1.5);
        let low = placement.history.iter().map(|m| m.lower_bound).fold(f64::INFINITY, f64::min);
        let high = placement.history.iter().map(|m| m.cost).fold(0.0, f64::max);
        let room = 0.08 * (high - low).max(1e-9 * high.max(1.0));
        let costs = [(low - 2.0 * room).max(0.0), high + room];
        (costs[1] > costs[0] && costs[1].is_finite()).then_some(Self { times: [begin, end], costs })
    }

    fn x(&self, seconds: f64) -> f64 {
        let [begin, end] = self.times.map(f64::ln);
        let at = seconds.max(SHORTEST).ln().clamp(begin, end);
        LEFT + (WIDTH - LEFT - RIGHT) * (at - begin) / (end - begin)
    }

    fn y(&self, cost: f64) -> f64 {
        let [low, high] = self.costs;
        TOP + (HEIGHT - TOP - BOTTOM) * (high - cost) / (high - low)
    }

    /// A value holds until the next moment.
    fn steps(&self, history: &[Moment], value: fn(&Moment) -> f64) -> String {
        let mut path = String::new();
        for (at, moment) in history.iter().enumerate() {
            let (x, y) = (self.x(moment.seconds), self.y(value(moment)));
            path += &if at == 0 { format!("M{x:.1} {y:.1}") } else { format!("H{x:.1}V{y:.1}") };
        }
        path
    }

    /// From the end of the cost along the bound to its beginning.
    fn back(&self, history: &[Moment]) -> String {
        let mut path = String::new();
        for pair in history.windows(2).rev() {
            let (before, after) = (&pair[0], &pair[1]);
            let (x, y) = (self.x(after.seconds), self.y(after.lower_bound));
            path +=
                &format!("L{x:.1} {y:.1}V{:.1}H{:.1}", self.y(before.lower_bound), self.x(before.seconds));
        }
        path
    }

    fn axes(&self, svg: &mut Svg) {
        let [low, high] = self.costs;
        for step in 0..=4 {
            let at = low + (high - low) * f64::from(step) / 4.0;
            let y = self.y(at);
            svg.path(&format!("M{LEFT} {y:.1}H{:.1}", WIDTH - RIGHT), "stroke:var(--line);stroke-width:1");
            svg.text(LEFT - 6.0, y + 4.0, "m", "end", &short(at));
        }
        let decades = (self.times[0].log10().floor() as i32)..=(self.times[1].log10().ceil() as i32);
        let inside = |seconds: &f64| (self.times[0]..=self.times[1]).contains(seconds);
        for seconds in decades.map(|power| 10f64.powi(power)).filter(inside) {
            let text =
                if seconds < 1.0 { format!("{:.0} ms", 1e3 * seconds) } else { format!("{seconds:.0} s") };
            svg.text(self.x(seconds), HEIGHT - BOTTOM + 16.0, "m", "middle", &text);
        }
        svg.text(f64::midpoint(LEFT, WIDTH), HEIGHT - 5.0, "m", "middle", "time since the solve began");
    }
}

/// A cost in four digits.
fn short(value: f64) -> String {
    match value {
        v if v >= 1e9 => format!("{:.3} bn", v / 1e9),
        v if v >= 1e6 => format!("{:.3} M", v / 1e6),
        v if v >= 1e3 => format!("{:.2} k", v / 1e3),
        v => format!("{v:.1}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cost_falls_and_bound_rises_in_steps() {
        let moment = |seconds, cost, lower_bound| Moment { seconds, cost, lower_bound };
        let history = vec![moment(0.01, 200.0, 50.0), moment(0.1, 150.0, 50.0), moment(1.0, 150.0, 140.0)];
        let drawn = figure(&PlacementFacts { history, ..Default::default() });
        assert!(drawn.contains("gap 6.7 %") && drawn.contains("100 ms") && !drawn.contains("NaN"), "{drawn}");
        assert_eq!(figure(&PlacementFacts::default()), "");
        let still = vec![moment(0.0, 5.0, 5.0)];
        let drawn = figure(&PlacementFacts { history: still, ..Default::default() });
        assert!(drawn.contains("gap 0.0 %") && !drawn.contains("NaN"), "{drawn}");
        let nothing = vec![moment(0.0, 0.0, 0.0)];
        assert!(!figure(&PlacementFacts { history: nothing, ..Default::default() }).contains("NaN"));
    }
}
