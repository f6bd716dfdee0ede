//! Aligned columns.

use std::io::{self, Write};

use crate::flow::escape;

/// Prints a header and rows with columns two spaces apart; empty cells are shown as `-`.
pub fn write<const N: usize>(
    out: &mut impl Write,
    header: [&str; N],
    rows: &[[String; N]],
) -> io::Result<()> {
    let rows: Vec<[String; N]> = rows
        .iter()
        .map(|row| {
            row.each_ref()
                .map(|cell| if cell.is_empty() { "-".to_owned() } else { escape(cell).into_owned() })
        })
        .collect();
    let header = header.map(str::to_owned);
    let width = |column: usize| {
        let cells = std::iter::once(&header).chain(&rows);
        cells.map(|row| row[column].chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..N).map(width).collect();
    for row in std::iter::once(&header).chain(&rows) {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            line.push_str(cell);
            line.extend(std::iter::repeat_n(' ', width - cell.chars().count() + 2));
        }
        writeln!(out, "{}", line.trim_end())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned() {
        let mut out = Vec::new();
        let rows = [["1", "shop/web", ""], ["234", "a\x1b", "x"]].map(|row| row.map(str::to_owned));
        write(&mut out, ["ID", "POD", "NOTE"], &rows).expect("memory");
        let expected = "ID   POD       NOTE\n1    shop/web  -\n234  a\\u{1b}   x\n";
        assert_eq!(String::from_utf8(out).expect("text"), expected);
    }
}
