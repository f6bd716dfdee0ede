//! Flows as lines of JSON in a file that is turned over when it is full.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::settings::FileSettings;
use crate::hubble::json;
use crate::hubble::proto::observer::GetFlowsResponse;

/// A file that grows to its bound, and those of before.
pub struct File {
    settings: FileSettings,
    open: Option<Open>,
}

struct Open {
    file: fs::File,
    bytes: u64,
}

impl File {
    /// Opens nothing yet.
    pub fn new(settings: FileSettings) -> Self {
        Self { settings, open: None }
    }

    /// Writes all of `flows`, or says why not; then none of them is in the file.
    pub async fn write(&mut self, flows: Vec<GetFlowsResponse>) -> Result<()> {
        let mut lines = Vec::with_capacity(flows.len() * 1024);
        for flow in &flows {
            lines.extend_from_slice(json::to_string(flow).as_bytes());
            lines.push(b'\n');
        }
        let (settings, open) = (self.settings.clone(), self.open.take());
        let writing = tokio::task::spawn_blocking(move || append(&settings, open, &lines)).await;
        self.open = Some(writing.context("writing flows")??);
        Ok(())
    }
}

fn append(settings: &FileSettings, open: Option<Open>, lines: &[u8]) -> Result<Open> {
    let path = &settings.path;
    let mut open = match open {
        Some(open) => open,
        None => Open::at(path).with_context(|| format!("opening {}", path.display()))?,
    };
    if open.bytes > 0 && open.bytes + lines.len() as u64 > settings.bytes_max {
        turn_over(settings).with_context(|| format!("turning {} over", path.display()))?;
        open = Open::at(path).with_context(|| format!("opening {}", path.display()))?;
    }
    if let Err(error) = open.file.write_all(lines) {
        // Half a line would spoil the next one, too.
        let _unchanged = open.file.set_len(open.bytes);
        return Err(error).with_context(|| format!("writing {}", path.display()));
    }
    open.bytes += lines.len() as u64;
    Ok(open)
}

impl Open {
    fn at(path: &Path) -> io::Result<Self> {
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory)?;
        }
        let mut options = OpenOptions::new();
        options.append(true).create(true).mode(0o600).custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC);
        let file = options.open(path)?;
        let bytes = file.metadata()?.len();
        Ok(Self { file, bytes })
    }
}

/// The file becomes `.1`, `.1` becomes `.2`; the last one goes.
fn turn_over(settings: &FileSettings) -> io::Result<()> {
    let numbered = |number: u32| -> PathBuf {
        let mut name = settings.path.clone().into_os_string();
        name.push(format!(".{number}"));
        name.into()
    };
    if settings.files_max == 0 {
        return fs::remove_file(&settings.path);
    }
    for number in (1..settings.files_max).rev() {
        match fs::rename(numbered(number), numbered(number + 1)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    fs::rename(&settings.path, numbered(1))
}
