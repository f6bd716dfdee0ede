//! Settings of the encryption between nodes.

use std::time::Duration;

use clap::{ArgAction, Args, ValueEnum};

use super::ipsec::IPSEC_DEVICE;
use super::slot::DEVICES;
use crate::settings::{SettingError, within};

/// Whether and how traffic between nodes is encrypted.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Encryption")]
pub struct EncryptionArgs {
    /// Encrypt what goes between pods of different nodes, and between pods and other nodes.
    #[arg(long, env = "WEIR_ENCRYPTION", value_enum, default_value = "off")]
    pub encryption: Mode,

    /// Send nothing in plain to any other node's pods, and drop what comes from them in plain, also where a
    /// node has no key yet. False while a running cluster changes to encryption or from it.
    #[arg(long, env = "WEIR_ENCRYPTION_STRICT", action = ArgAction::Set, default_value_t = true)]
    pub encryption_strict: bool,

    /// UDP port of WireGuard. The next one is used, too: keys change between the two.
    #[arg(long, env = "WEIR_WIREGUARD_PORT", value_name = "PORT", default_value_t = 51871)]
    pub wireguard_port: u16,

    /// Keys that are older are changed, in the whole cluster; 0: on command alone.
    #[arg(long, env = "WEIR_ENCRYPTION_KEY_DAYS", value_name = "DAYS", default_value_t = 0)]
    pub encryption_key_days: u32,

    /// Who encrypts: the kernel's WireGuard, or a process of Weir's on kernels without it.
    #[arg(long, env = "WEIR_WIREGUARD_DEVICE", value_enum, default_value = "auto")]
    pub wireguard_device: DeviceChoice,
}

/// How traffic between nodes is encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// Not at all.
    Off,
    /// By WireGuard.
    Wireguard,
    /// By the kernel's IPsec: experimental, no test between two nodes has been seen to pass.
    Ipsec,
}

/// Who encrypts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DeviceChoice {
    /// The kernel where it can, else the process.
    Auto,
    /// The kernel; without its WireGuard the agent does not start.
    Kernel,
    /// The process, whatever the kernel can.
    User,
}

impl Mode {
    /// The devices that encrypt so.
    pub fn devices(self) -> &'static [&'static str] {
        match self {
            Self::Off => &[],
            Self::Wireguard => &DEVICES,
            Self::Ipsec => &[IPSEC_DEVICE],
        }
    }
}

impl EncryptionArgs {
    /// Keys that are older are changed.
    pub fn key_age(&self) -> Option<Duration> {
        let days = (self.encryption_key_days > 0).then_some(self.encryption_key_days)?;
        Some(Duration::from_secs(u64::from(days) * 24 * 3600))
    }

    /// Refuses what makes no sense.
    pub fn check(&self) -> Result<(), SettingError> {
        within("wireguard-port", self.wireguard_port, 1..=u16::MAX - 1)
    }
}
