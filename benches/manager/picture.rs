//! Draws the results as a picture.

use std::error::Error;

use plotters::prelude::*;
use sqlx::error::BoxDynError;

use crate::who::Who;

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/manager.svg");

/// The results of one way to lock.
#[derive(Clone)]
pub(crate) struct Line {
    pub(crate) who: Who,
    pub(crate) points: Vec<(u32, f64)>,
}

impl Line {
    pub(crate) fn new(who: Who) -> Self {
        Self { who, points: Vec::new() }
    }

    pub(crate) fn add(&mut self, x: u32, y: f64) {
        self.points.push((x, y));
    }
}

/// Lines in one pair of axes, both logarithmic.
pub(crate) struct Panel {
    title: &'static str,
    x: &'static str,
    y: &'static str,
    lines: Vec<Line>,
}

impl Panel {
    pub(crate) fn new(
        title: &'static str,
        x: &'static str,
        y: &'static str,
        lines: Vec<Line>,
    ) -> Self {
        Self { title, x, y, lines }
    }
}

/// Draws a large panel, and two small ones below. The background is white, so that the picture can be read on any page.
pub(crate) fn draw(panels: &[Panel; 3]) -> Result<(), BoxDynError> {
    let [large, left, right] = panels;
    let whole = SVGBackend::new(FILE, (900, 800)).into_drawing_area();
    whole.fill(&WHITE)?;
    let (top, bottom) = whole.split_vertically(460);
    let (bottom_left, bottom_right) = bottom.split_horizontally(450);
    panel(&top, large, true)?;
    panel(&bottom_left, left, false)?;
    panel(&bottom_right, right, false)?;
    whole.present()?;
    Ok(())
}

fn panel<B: DrawingBackend<ErrorType: 'static>>(
    area: &DrawingArea<B, plotters::coord::Shift>,
    panel: &Panel,
    with_legend: bool,
) -> Result<(), Box<dyn Error + Send + Sync>> {
    let points = || panel.lines.iter().flat_map(|line| &line.points);
    let x = points().map(|(x, _)| f64::from(*x)).fold(1.0, f64::max);
    let least = points().map(|(_, y)| *y).fold(f64::INFINITY, f64::min);
    let most = points().map(|(_, y)| *y).fold(1.0, f64::max);
    // Leaves room for the legend, below the lines.
    let floor = least * if with_legend { 0.08 } else { 0.8 };
    let mut chart = ChartBuilder::on(area)
        .caption(panel.title, ("sans-serif", 22))
        .margin(12)
        .x_label_area_size(42)
        .y_label_area_size(76)
        .build_cartesian_2d((0.9..x * 1.1).log_scale(), (floor..most * 1.3).log_scale())?;
    chart
        .configure_mesh()
        .x_desc(panel.x)
        .y_desc(panel.y)
        .label_style(("sans-serif", 16))
        .axis_desc_style(("sans-serif", 17))
        .light_line_style(WHITE)
        .x_label_formatter(&|x| grouped(*x))
        .y_label_formatter(&|y| grouped(*y))
        .draw()?;
    for line in &panel.lines {
        let style = style(line.who);
        let points = line.points.iter().map(|&(x, y)| (f64::from(x), y));
        chart
            .draw_series(LineSeries::new(points, style).point_size(style.stroke_width + 1))?
            .label(line.who.name().replace('`', ""))
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 22, y)], style));
    }
    if with_legend {
        chart
            .configure_series_labels()
            .label_font(("sans-serif", 16))
            .background_style(WHITE)
            .border_style(BLACK.mix(0.3))
            .position(SeriesLabelPosition::LowerRight)
            .draw()?;
    }
    Ok(())
}

/// Returns the style of a line. Colour-blind readers can distinguish the colours, and lines that cover each other
/// differ in their widths.
fn style(who: Who) -> ShapeStyle {
    let (colour, width) = match who {
        Who::Sqlx => (RGBColor(230, 159, 0), 6),
        Who::ByHand => (RGBColor(204, 121, 167), 4),
        Who::Lock => (RGBColor(0, 158, 115), 2),
        Who::Floor => (RGBColor(120, 120, 120), 5),
        Who::ManagerAwaited => (RGBColor(86, 180, 233), 3),
        Who::Manager => (RGBColor(0, 114, 178), 3),
    };
    colour.filled().stroke_width(width)
}

/// Formats a whole number with separators between the thousands.
fn grouped(number: f64) -> String {
    let digits = format!("{number:.0}");
    let mut grouped = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place) % 3 == 0 {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}
