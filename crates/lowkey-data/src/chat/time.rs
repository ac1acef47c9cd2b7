//! The time that a template may ask for (`strftime_now`), written as Python's `strftime` writes it.

use std::fmt::{self, Write as _};
use std::str::FromStr;

/// What a template takes for the present.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Now {
    /// The computer's clock, in its time zone.
    #[default]
    Clock,
    /// This moment, so that the same text comes out every time.
    At(DateTime),
}

impl Now {
    pub(crate) fn get(self) -> DateTime {
        match self {
            Self::At(moment) => moment,
            Self::Clock => {
                let now = jiff::Zoned::now();
                DateTime {
                    year: i32::from(now.year()),
                    month: now.month().unsigned_abs().into(),
                    day: now.day().unsigned_abs().into(),
                    hour: now.hour().unsigned_abs().into(),
                    minute: now.minute().unsigned_abs().into(),
                    second: now.second().unsigned_abs().into(),
                }
            }
        }
    }
}

/// A date and a time of day, in no time zone. Reads `2026-01-15`, `2026-01-15T12:00` and `2026-01-15T12:00:00`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DateTime {
    year: i32,
    month: u32,
    day: u32,
    hour: u32,
    minute: u32,
    second: u32,
}

impl fmt::Display for DateTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.strftime("%Y-%m-%dT%H:%M:%S"))
    }
}

impl FromStr for DateTime {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let fail = || format!("{text:?} is no time; write it like 2026-01-15T12:00:00");
        let (date, time) = text.split_once(['T', ' ']).unwrap_or((text, "00:00:00"));
        let numbers = |text: &str, mark: char, widths: &[usize]| -> Option<Vec<u32>> {
            let parts: Vec<&str> = text.split(mark).collect();
            let fits = parts.len() == widths.len()
                && parts
                    .iter()
                    .zip(widths)
                    .all(|(part, width)| part.len() == *width && part.bytes().all(|b| b.is_ascii_digit()));
            fits.then(|| parts.iter().map(|part| part.parse().ok()).collect())?
        };
        let [year, month, day] = numbers(date, '-', &[4, 2, 2]).ok_or_else(fail)?[..] else { return Err(fail()) };
        let time = numbers(time, ':', &[2, 2, 2]).or_else(|| numbers(time, ':', &[2, 2])).ok_or_else(fail)?;
        let (hour, minute, second) = (time[0], time[1], time.get(2).copied().unwrap_or(0));
        let moment = Self { year: year as i32, month, day, hour, minute, second };
        let fits = (1..=12).contains(&month) && (1..=moment.days_of_month(month)).contains(&day);
        if year > 0 && fits && hour < 24 && minute < 60 && second < 60 { Ok(moment) } else { Err(fail()) }
    }
}

const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

impl DateTime {
    fn is_leap(&self) -> bool {
        self.year % 4 == 0 && (self.year % 100 != 0 || self.year % 400 == 0)
    }

    fn days_of_month(&self, month: u32) -> u32 {
        match month {
            2 if self.is_leap() => 29,
            2 => 28,
            4 | 6 | 9 | 11 => 30,
            _ => 31,
        }
    }

    /// The day of the year, from 1.
    fn day_of_year(&self) -> u32 {
        (1..self.month).map(|month| self.days_of_month(month)).sum::<u32>() + self.day
    }

    /// The day of the week, from Sunday as 0. Days since the first of January of the year 1, a Monday.
    fn day_of_week(&self) -> u32 {
        let years = self.year - 1;
        let days = years * 365 + years / 4 - years / 100 + years / 400 + self.day_of_year() as i32;
        days.rem_euclid(7) as u32
    }

    /// Python's `strftime` in the C locale. What it does not know stays as it stands, and so does a width.
    pub(crate) fn strftime(&self, format: &str) -> String {
        let mut out = String::new();
        let mut rest = format.chars();
        while let Some(c) = rest.next() {
            if c != '%' {
                out.push(c);
                continue;
            }
            let mut after = rest.clone();
            let unpadded = after.as_str().starts_with('-');
            if unpadded {
                after.next();
            }
            let Some(code) = after.next() else {
                out.push('%');
                continue;
            };
            if self.field(code, unpadded, &mut out) {
                rest = after;
            } else {
                out.push('%');
            }
        }
        out
    }

    fn field(&self, code: char, unpadded: bool, out: &mut String) -> bool {
        let (week, year_day) = (self.day_of_week(), self.day_of_year());
        let twelve = (self.hour + 11) % 12 + 1;
        let names = |names: &[&'static str], i: u32| names.get(i as usize).copied().unwrap_or_default();
        let (day, month) = (names(&DAYS, week), names(&MONTHS, self.month - 1));
        let mut number = |number: u32, width: usize, fill: char| {
            let width = if unpadded { 0 } else { width };
            // Writing to a string cannot fail.
            let _ = if fill == '0' { write!(out, "{number:0width$}") } else { write!(out, "{number:width$}") };
        };
        match code {
            'Y' => number(self.year.unsigned_abs(), 4, '0'),
            'C' => number(self.year.unsigned_abs() / 100, 2, '0'),
            'y' => number(self.year.unsigned_abs() % 100, 2, '0'),
            'm' => number(self.month, 2, '0'),
            'd' => number(self.day, 2, '0'),
            'e' => number(self.day, 2, ' '),
            'H' => number(self.hour, 2, '0'),
            'k' => number(self.hour, 2, ' '),
            'I' => number(twelve, 2, '0'),
            'l' => number(twelve, 2, ' '),
            'M' => number(self.minute, 2, '0'),
            'S' => number(self.second, 2, '0'),
            'f' => number(0, 6, '0'),
            'j' => number(year_day, 3, '0'),
            'w' => number(week, 0, '0'),
            'u' => number(if week == 0 { 7 } else { week }, 0, '0'),
            'U' => number((year_day + 6 - week) / 7, 2, '0'),
            'W' => number((year_day + 6 - (week + 6) % 7) / 7, 2, '0'),
            'A' => out.push_str(day),
            'a' => out.push_str(&day[..3]),
            'B' => out.push_str(month),
            'b' | 'h' => out.push_str(&month[..3]),
            'p' => out.push_str(if self.hour < 12 { "AM" } else { "PM" }),
            'P' => out.push_str(if self.hour < 12 { "am" } else { "pm" }),
            // Python's datetime without a time zone.
            'z' | 'Z' => {}
            'n' => out.push('\n'),
            't' => out.push('\t'),
            '%' => out.push('%'),
            'F' => out.push_str(&self.strftime("%Y-%m-%d")),
            'T' | 'X' => out.push_str(&self.strftime("%H:%M:%S")),
            'R' => out.push_str(&self.strftime("%H:%M")),
            'r' => out.push_str(&self.strftime("%I:%M:%S %p")),
            'D' | 'x' => out.push_str(&self.strftime("%m/%d/%y")),
            'c' => out.push_str(&self.strftime("%a %b %e %H:%M:%S %Y")),
            _ => return false,
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_as_python_writes_them() {
        let noon: DateTime = "2026-01-15T12:00:00".parse().unwrap();
        assert_eq!(noon.strftime("%d %b %Y"), "15 Jan 2026");
        assert_eq!(noon.strftime("%A, %B %-d, %y %I:%M %p"), "Thursday, January 15, 26 12:00 PM");
        let early: DateTime = "2024-03-05 07:08".parse().unwrap();
        assert_eq!(early.strftime("%Y-%m-%d %H:%M:%S|%e|%-d|%j|%w|%u"), "2024-03-05 07:08:00| 5|5|065|2|2");
        assert_eq!(early.strftime("%U %W %c %x %X"), "09 10 Tue Mar  5 07:08:00 2024 03/05/24 07:08:00");
        assert_eq!(early.strftime("100% %Q %%"), "100% %Q %");
    }

    #[test]
    fn what_is_no_time_is_refused() {
        for text in ["", "now", "2026-13-01", "2025-02-29", "2026-01-15T24:00:00", "2026-1-5", "0000-01-01"] {
            assert!(text.parse::<DateTime>().unwrap_err().contains("2026-01-15T12:00:00"), "{text}");
        }
        assert!("2024-02-29".parse::<DateTime>().is_ok());
    }
}
