//! `weir cni`: puts the plugin on this node, or takes it away. The agent does the same at
//! start when it is told where; this is for nodes that are set up by hand.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::Failure;
use crate::cni::install::{self, Configuration, Directories};

#[derive(Subcommand)]
pub(super) enum CniCommand {
    /// Install weir-cni, and the network configuration that makes the runtime use it.
    Install(InstallArgs),
    /// Remove both; other plugins' configurations are moved back.
    Uninstall(DirectoryArgs),
}

/// Where the container runtime looks.
#[derive(Args)]
pub(super) struct DirectoryArgs {
    /// For CNI plugins.
    #[arg(long, env = "WEIR_CNI_BIN_DIR", value_name = "DIR", default_value = "/opt/cni/bin")]
    cni_bin_dir: PathBuf,

    /// For network configurations.
    #[arg(long, env = "WEIR_CNI_CONFIG_DIR", value_name = "DIR", default_value = "/etc/cni/net.d")]
    cni_config_dir: PathBuf,
}

impl DirectoryArgs {
    pub(super) fn directories(&self) -> Directories {
        Directories { binaries: self.cni_bin_dir.clone(), configurations: self.cni_config_dir.clone() }
    }
}

#[derive(Args)]
pub(super) struct InstallArgs {
    #[command(flatten)]
    directories: DirectoryArgs,

    /// The agent's socket.
    #[arg(long, env = "WEIR_SOCKET", value_name = "PATH", default_value = crate::api::DEFAULT_SOCKET)]
    socket: PathBuf,

    /// The agent's state directory.
    #[arg(long, env = "WEIR_STATE_DIR", value_name = "DIR", default_value = "/var/lib/weir")]
    state_dir: PathBuf,

    /// Leave other plugins' configurations where they are.
    #[arg(long)]
    keep_others: bool,
}

pub(super) fn run(command: CniCommand) -> Result<(), Failure> {
    match command {
        CniCommand::Install(args) => {
            let directories = args.directories.directories();
            install::install_binary(&directories)?;
            let configuration = Configuration {
                socket: &args.socket,
                state_dir: &args.state_dir,
                is_exclusive: !args.keep_others,
            };
            install::write_configuration(&directories, &configuration)?;
        }
        CniCommand::Uninstall(args) => install::uninstall(&args.directories())?,
    }
    Ok(())
}
