//! The node's secret: what pods must not be able to compute depends on it.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

use anyhow::{Context, Result};

use crate::files::{self, Survives};

const FILE: &str = "secret";
const BYTES: usize = 16;

/// Reads the secret of the state directory; makes one where there is none. An agent that is started again
/// finds what the one before it has put into caches.
pub fn of(state_directory: &Path) -> Result<[u64; 2]> {
    let path = state_directory.join(FILE);
    let reading = || format!("reading {}", path.display());
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes.try_into().ok(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(error).with_context(reading),
    };
    let bytes: [u8; BYTES] = match bytes {
        Some(bytes) => bytes,
        // None, or one that was cut off when the machine lost power.
        None => make(&path).with_context(|| format!("making {}", path.display()))?,
    };
    let number = u128::from_le_bytes(bytes);
    Ok([number as u64, (number >> 64) as u64])
}

fn make(path: &Path) -> io::Result<[u8; BYTES]> {
    let mut bytes = [0; BYTES];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    files::replace(path, &bytes, 0o600, Survives::Process)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_stays_and_is_nobody_elses() -> Result<()> {
        let (here, there) = (tempfile::tempdir()?, tempfile::tempdir()?);
        let secret = of(here.path())?;
        assert_eq!(of(here.path())?, secret);
        assert_ne!(of(there.path())?, secret);
        let path = here.path().join(FILE);
        assert_eq!(
            std::os::unix::fs::PermissionsExt::mode(&fs::metadata(&path)?.permissions()) & 0o777,
            0o600
        );
        fs::write(path, b"torn")?;
        assert_ne!(of(here.path())?, secret);
        Ok(())
    }
}
