//! A small SVG writer: escaped text, numbers in their shortest form, one element per call.

use std::fmt::Write;

/// An SVG drawing under construction. Coordinates are user units; the viewer scales the whole.
pub(super) struct Svg {
    body: String,
    width: f64,
    height: f64,
}

impl Svg {
    pub(super) fn new(width: f64, height: f64) -> Self {
        Self { body: String::new(), width, height }
    }

    /// A filled rectangle; `fill` is a CSS colour or variable.
    pub(super) fn rect(&mut self, x: f64, y: f64, width: f64, height: f64, fill: &str) {
        self.element(&format!(
            "<rect x=\"{}\" y=\"{}\" width=\"{}\" height=\"{}\" style=\"fill:{fill}\"/>",
            number(x),
            number(y),
            number(width),
            number(height)
        ));
    }

    /// A rectangle that tells its value when pointed at.
    pub(super) fn rect_titled(&mut self, frame: [f64; 4], fill: &str, title: &str) {
        let [x, y, width, height] = frame.map(number);
        self.element(&format!(
            "<rect x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{height}\" style=\"fill:{fill}\"><title>{}</title></rect>",
            escape(title)
        ));
    }

    /// Text with a class (`t` plain, `m` muted, `h` heading) and an anchor (`start`, `middle`, `end`).
    pub(super) fn text(&mut self, x: f64, y: f64, class: &str, anchor: &str, text: &str) {
        self.element(&format!(
            "<text x=\"{}\" y=\"{}\" class=\"{class}\" text-anchor=\"{anchor}\">{}</text>",
            number(x),
            number(y),
            escape(text)
        ));
    }

    /// Text turned to be read from below, for vertical axes.
    pub(super) fn text_upward(&mut self, x: f64, y: f64, class: &str, text: &str) {
        let (x, y) = (number(x), number(y));
        self.element(&format!(
            "<text x=\"{x}\" y=\"{y}\" class=\"{class}\" text-anchor=\"middle\" transform=\"rotate(-90 {x} {y})\">{}</text>",
            escape(text)
        ));
    }

    /// A path; `style` is its CSS.
    pub(super) fn path(&mut self, data: &str, style: &str) {
        self.element(&format!("<path d=\"{data}\" style=\"{style}\"/>"));
    }

    fn element(&mut self, element: &str) {
        self.body.push_str(element);
        self.body.push('\n');
    }

    /// The drawing, with a label for readers that cannot see it and extra attributes (`data-…`).
    pub(super) fn finish(self, label: &str, attributes: &str) -> String {
        format!(
            "<svg viewBox=\"0 0 {} {}\" role=\"img\" aria-label=\"{}\" {attributes}>\n{}</svg>\n",
            number(self.width),
            number(self.height),
            escape(label),
            self.body
        )
    }
}

/// A number without needless digits.
pub(super) fn number(value: f64) -> String {
    let text = format!("{value:.2}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    if text == "-0" { "0".into() } else { text.into() }
}

/// Text made safe for element content and for double-quoted attributes.
pub(super) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c if c.is_control() && c != '\n' && c != '\t' => {
                let _ = write!(out, "\u{fffd}");
            }
            c => out.push(c),
        }
    }
    out
}

/// JSON made safe inside a `<script>` element: no `</script>`, no `<!--`.
pub(super) fn script_safe(json: &str) -> String {
    json.replace('<', "\\u003c")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        assert_eq!(number(3.0), "3");
        assert_eq!(number(3.10), "3.1");
        assert_eq!(number(-0.001), "0");
        assert_eq!(number(120.0), "120");
    }

    #[test]
    fn markup_in_text_stays_text() {
        assert_eq!(escape("<a b=\"c\">&'\u{7}"), "&lt;a b=&quot;c&quot;&gt;&amp;&#39;\u{fffd}");
        assert_eq!(script_safe("{\"t\":\"</script>\"}"), "{\"t\":\"\\u003c/script>\"}");
    }
}
