//! The archive: one gzipped tar file, written as things arrive.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, Result};
use flate2::Compression;
use flate2::write::GzEncoder;
use jiff::Timestamp;

use super::{Entry, Missing};

/// Of all files before compression.
const BYTES_MAX: usize = 512 * 1024 * 1024;

/// An archive that is being written.
pub struct Archive {
    tar: tar::Builder<GzEncoder<File>>,
    root: String,
    time: u64,
    bytes: usize,
    missing: Vec<Missing>,
}

impl Archive {
    /// Only its owner may read it: it tells a lot about a cluster.
    pub fn create(path: &Path, root: &str, time: Timestamp) -> Result<Self> {
        let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path);
        let file = file.with_context(|| format!("making {}", path.display()))?;
        Ok(Self {
            tar: tar::Builder::new(GzEncoder::new(file, Compression::default())),
            root: root.to_owned(),
            time: u64::try_from(time.as_second()).unwrap_or_default(),
            bytes: 0,
            missing: Vec::new(),
        })
    }

    /// Writes a file, or notes why there is none.
    pub fn add(&mut self, entry: Entry) -> Result<()> {
        let content = match entry.content {
            Ok(content) => content,
            Err(error) => {
                self.note(&entry.path, crate::error::chain(&error));
                return Ok(());
            }
        };
        if self.bytes + content.len() > BYTES_MAX {
            self.note(&entry.path, format!("the archive would be larger than {BYTES_MAX} bytes"));
            return Ok(());
        }
        self.write(&entry.path, &content)
    }

    /// Notes that a file is not what it should be.
    pub fn note(&mut self, path: &str, reason: String) {
        self.missing.push(Missing { path: path.to_owned(), reason });
    }

    /// What was noted so far.
    pub fn missing(&self) -> &[Missing] {
        &self.missing
    }

    /// Writes the last file, and everything to the disk.
    pub fn finish(mut self, last: Entry) -> Result<()> {
        self.write(&last.path, &last.content?)?;
        let file = self.tar.into_inner().and_then(GzEncoder::finish);
        file.and_then(|mut file| file.flush()).context("writing the archive")
    }

    fn write(&mut self, path: &str, content: &[u8]) -> Result<()> {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o600);
        header.set_mtime(self.time);
        let path = format!("{}/{path}", self.root);
        self.tar.append_data(&mut header, &path, content).with_context(|| format!("writing {path}"))?;
        self.bytes += content.len();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::io::Read;

    use flate2::read::GzDecoder;

    use super::*;

    #[test]
    fn what_is_missing_does_not_fail_the_rest() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("dump.tar.gz");
        let mut archive = Archive::create(&path, "dump", Timestamp::UNIX_EPOCH).expect("an archive");
        archive.add(Entry::new("nodes/a/status.json", Ok(b"{}".to_vec()))).expect("a file");
        archive.add(Entry::new("nodes/b", Err(anyhow::anyhow!("away")))).expect("a note");
        let reasons: Vec<_> = archive.missing().iter().map(|missing| missing.reason.clone()).collect();
        assert_eq!(reasons, ["away"]);
        archive.finish(Entry::new("summary.json", Ok(b"1".to_vec()))).expect("the end");

        let mut read = tar::Archive::new(GzDecoder::new(File::open(&path).expect("the file")));
        let mut files = BTreeMap::new();
        for entry in read.entries().expect("entries") {
            let mut entry = entry.expect("an entry");
            let mut text = String::new();
            entry.read_to_string(&mut text).expect("text");
            files.insert(entry.path().expect("a path").display().to_string(), text);
        }
        let expected = [("dump/nodes/a/status.json", "{}"), ("dump/summary.json", "1")];
        assert_eq!(files, expected.map(|(path, text)| (path.to_owned(), text.to_owned())).into());
    }
}
