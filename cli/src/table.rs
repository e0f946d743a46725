//! Text in columns.

/// Rows under a heading, columns as wide as their widest cell. Cells that hold a number only are aligned right.
pub fn render(heading: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.chain([heading[column].len()]).max().unwrap_or_default()
    };
    let widths: Vec<usize> = (0..heading.len()).map(width).collect();
    let line = |cells: &[String]| {
        let mut text = String::from(" ");
        for (cell, width) in cells.iter().zip(&widths) {
            let is_number = !cell.is_empty() && cell.bytes().all(|byte| byte.is_ascii_digit());
            match is_number {
                true => text.push_str(&format!(" {cell:>width$}")),
                false => text.push_str(&format!(" {cell:<width$}")),
            }
            text.push(' ');
        }
        format!("{}\n", text.trim_end())
    };
    let heading: Vec<String> = heading.iter().map(|cell| (*cell).to_owned()).collect();
    rows.iter().fold(line(&heading), |text, row| text + &line(row))
}

/// Two columns without a heading.
pub fn pairs(rows: &[(&str, String)]) -> String {
    let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or_default();
    rows.iter().fold(String::new(), |text, (name, value)| text + &format!("{name:<width$}  {value}\n"))
}
