import { svelte } from '@sveltejs/vite-plugin-svelte';
import { defineConfig } from 'vitest/config';

// The built page is checked in and embedded in the weir binary. So names carry no hash, no file
// is inlined as data: (the content security policy forbids it for scripts), and one build gives
// the same bytes on every machine.
export default defineConfig({
  plugins: [svelte()],
  base: './',
  build: {
    target: 'es2022',
    assetsInlineLimit: 0,
    modulePreload: false,
    license: { fileName: 'licenses.md' },
    rollupOptions: {
      output: {
        entryFileNames: 'assets/[name].js',
        chunkFileNames: 'assets/[name].js',
        assetFileNames: 'assets/[name][extname]',
      },
    },
  },
  worker: {
    format: 'es',
    rollupOptions: { output: { entryFileNames: 'assets/[name].js' } },
  },
  server: { proxy: { '/api': process.env.WEIR_API ?? 'http://127.0.0.1:4246' } },
  test: {
    projects: [
      { extends: true, test: { name: 'unit', environment: 'node', include: ['tests/unit/*.test.ts'] } },
      // In Chromium: against a test server, and against a real agent (tests/it/page.rs).
      ...['browser', 'real'].map((name) => ({
        extends: true as const,
        test: {
          name,
          environment: 'node' as const,
          include: [`tests/${name}/*.test.ts`],
          testTimeout: 30_000,
          hookTimeout: 60_000,
          // A browser on a busy machine may be slow once.
          retry: 1,
          fileParallelism: false,
        },
      })),
    ],
  },
});
