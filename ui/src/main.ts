import { mount } from 'svelte';
import './app.css';
import App from './App.svelte';
import { app } from './app.svelte.ts';

app.start();
mount(App, { target: document.getElementById('app')! });
