//! Draws the results as a picture.

use std::time::Duration;

use plotters::coord::Shift;
use plotters::prelude::*;
use sqlx::error::BoxDynError;

use crate::Service;
use crate::process::Measured;
use crate::way::Way;

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/service.svg");

const SIZE: (u32, u32) = (400, 300);

/// A service under a load, and the results of each way to serialize work.
pub(crate) struct Row {
    pub(crate) service: Service,
    /// The load in percent, or zero in the closed loop.
    pub(crate) load: u64,
    pub(crate) time: Duration,
    pub(crate) measured: Vec<(Way, Measured)>,
}

impl Row {
    /// Returns how many cycles ended per second.
    pub(crate) fn rate(&self, measured: &Measured) -> f64 {
        measured.cycles() / self.time.as_secs_f64()
    }

    pub(crate) fn rate_of_row_locks(&self) -> f64 {
        let mut row_locks = self.measured.iter().filter(|(way, _)| *way == Way::RowLock);
        row_locks.next().map_or(0.0, |(_, measured)| self.rate(measured))
    }

    fn title(&self) -> String {
        let Service { pool, round_trip, .. } = self.service;
        let load = match self.load {
            0 => "closed loop".to_owned(),
            load => format!("open loop, {load} %"),
        };
        let link =
            if round_trip.is_zero() { String::new() } else { format!(", {round_trip:?} link") };
        format!("pool of {pool}{link}: {load}")
    }
}

/// Draws the waits of each row from the median to the 99th percentile, and an unrelated query beside them. The labels
/// below show the rates, relative to the first way. The background is white, so that the picture can be read on any
/// page.
pub(crate) fn draw(rows: &[Row]) -> Result<(), BoxDynError> {
    let columns = 1 + crate::LOADS.len();
    let height = u32::try_from(rows.len().div_ceil(columns))?;
    let size = (SIZE.0 * u32::try_from(columns)?, SIZE.1 * height);
    let whole = SVGBackend::new(FILE, size).into_drawing_area();
    whole.fill(&WHITE)?;
    for (area, row) in whole.split_evenly((rows.len().div_ceil(columns), columns)).iter().zip(rows)
    {
        panel(area, row)?;
    }
    whole.present()?;
    Ok(())
}

fn panel<B: DrawingBackend<ErrorType: 'static>>(
    area: &DrawingArea<B, Shift>,
    row: &Row,
) -> Result<(), BoxDynError> {
    const LEAST: f64 = 0.1;
    const MOST: f64 = 10_000.0;
    let (wait, query) = (RGBColor(0, 114, 178), RGBColor(230, 159, 0));

    let count = i32::try_from(row.measured.len())?;
    let first = row.measured.first().map_or(f64::NAN, |(_, measured)| row.rate(measured));
    let label = |x: &i32| {
        let way = usize::try_from(*x).ok().and_then(|x| row.measured.get(x));
        way.map_or_else(String::new, |(way, measured)| {
            format!("{} {:.2}", way.short_name(), row.rate(measured) / first)
        })
    };
    let mut chart = ChartBuilder::on(area)
        .caption(row.title(), ("sans-serif", 17))
        .margin(8)
        .x_label_area_size(62)
        .y_label_area_size(52)
        .build_cartesian_2d(-1..count, (LEAST..MOST).log_scale())?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(WHITE)
        .x_labels(row.measured.len() + 2)
        .x_label_style(("sans-serif", 13).into_font().transform(FontTransform::Rotate90))
        .x_label_formatter(&label)
        .y_desc("ms")
        .draw()?;
    for (x, (_, measured)) in (0..).zip(&row.measured) {
        let [median, late] = [0.5, 0.99].map(|q| measured.wait(q).clamp(LEAST, MOST));
        let asked = measured.query(0.5).clamp(LEAST, MOST);
        chart.draw_series([PathElement::new([(x, median), (x, late)], wait.stroke_width(3))])?;
        chart.draw_series([median, late].map(|y| Circle::new((x, y), 4, wait.filled())))?;
        chart.draw_series([TriangleMarker::new((x, asked), 6, query.filled())])?;
    }
    Ok(())
}
