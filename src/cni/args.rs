//! Settings of the plugin's installation.

use std::path::PathBuf;

use clap::{ArgAction, Args};

use crate::settings::SettingError;

/// Where the container runtime looks, and what to do with others' configurations.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "CNI")]
pub struct CniArgs {
    /// Where the container runtime looks for CNI plugins: weir-cni is put there at start.
    #[arg(long, env = "WEIR_CNI_BIN_DIR", value_name = "DIR")]
    pub cni_bin_dir: Option<PathBuf>,

    /// Where the container runtime looks for network configurations: ours is put there once
    /// pods can be connected, and stays.
    #[arg(long, env = "WEIR_CNI_CONFIG_DIR", value_name = "DIR")]
    pub cni_config_dir: Option<PathBuf>,

    /// Move other plugins' network configurations aside; `weir cni uninstall` moves them back.
    #[arg(long, env = "WEIR_CNI_EXCLUSIVE", action = ArgAction::Set, default_value_t = true)]
    pub cni_exclusive: bool,
}

impl CniArgs {
    /// Refuses paths that would depend on where the agent was started.
    pub fn check(&self) -> Result<(), SettingError> {
        for (setting, path) in [("cni-bin-dir", &self.cni_bin_dir), ("cni-config-dir", &self.cni_config_dir)]
        {
            if let Some(path) = path.as_ref().filter(|path| !path.is_absolute()) {
                return Err(SettingError::new(setting, path.display(), "must be an absolute path"));
            }
        }
        Ok(())
    }
}
